"""
tiree: SP8192 CaseOps + SmearGate (BOS-masked) + sparse attention gate + looped U-net
       + GPTQ/LQER + per-group compression + slot-batched per-document LoRA TTT (phased) + token-only tilt

Everything lives in this one file. Run:

    torchrun --standalone --nproc_per_node=8 train_gpt.py

Data layout (lossless CaseOps export, 50,000 validation documents):
    $DATA_DIR/fineweb_train_*.bin         uint16 tokens
    $DATA_DIR/fineweb_val_*.bin           uint16 tokens
    $DATA_DIR/fineweb_val_bytes_*.bin     uint16, bytes of the ORIGINAL text behind each validation token
"""

from __future__ import annotations

import copy
import glob
import io
import json
import lzma
import math
import os
import random
import struct
import sys
import time
import uuid
from collections import deque
from pathlib import Path

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

from flash_attn_interface import flash_attn_func, flash_attn_varlen_func


# ---------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------


def _env(name, default):
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw not in ("0", "", "false", "False")
    return type(default)(raw)


class Settings:
    # paths
    data_dir = _env("DATA_DIR", "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved")
    train_files = os.path.join(data_dir, "fineweb_train_*.bin")
    val_files = os.path.join(data_dir, "fineweb_val_*.bin")
    val_bytes_files = os.path.join(data_dir, "fineweb_val_bytes_*.bin")
    tokenizer_path = _env(
        "TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    )
    caseops = _env("CASEOPS_ENABLED", True)
    run_id = _env("RUN_ID", str(uuid.uuid4()))
    artifact_path = _env("ARTIFACT_PATH", "final_model.tiree.ptz")
    seed = _env("SEED", 42)

    # schedule
    iterations = _env("ITERATIONS", 20_000)
    max_wallclock_seconds = _env("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = _env("GPTQ_RESERVE_SECONDS", 32.0)
    warmup_steps = _env("WARMUP_STEPS", 20)
    warmdown_frac = _env("WARMDOWN_FRAC", 0.75)
    min_lr = _env("MIN_LR", 0.1)
    train_batch_tokens = _env("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = _env("TRAIN_SEQ_LEN", 2048)
    train_log_every = _env("TRAIN_LOG_EVERY", 500)
    val_loss_every = _env("VAL_LOSS_EVERY", 0)
    loop_at = _env("ENABLE_LOOPING_AT", 0.35)

    # model
    vocab_size = _env("VOCAB_SIZE", 8192)
    num_layers = _env("NUM_LAYERS", 11)
    model_dim = _env("MODEL_DIM", 512)
    num_heads = _env("NUM_HEADS", 8)
    num_kv_heads = _env("NUM_KV_HEADS", 4)
    mlp_mult = _env("MLP_MULT", 4.0)
    rope_base = _env("ROPE_BASE", 10_000.0)
    rope_dims = _env("ROPE_DIMS", 16)
    logit_softcap = _env("LOGIT_SOFTCAP", 30.0)
    qk_gain = _env("QK_GAIN_INIT", 5.0)
    loop_start = _env("LOOP_START", 3)
    loop_end = _env("LOOP_END", 5)
    num_loops = _env("NUM_LOOPS", 2)
    xsa_last_n = _env("XSA_LAST_N", 11)
    gate_window = _env("GATE_WINDOW", 12)
    sparse_gate_scale = _env("SPARSE_ATTN_GATE_SCALE", 1.0)
    tied_init_std = _env("TIED_EMBED_INIT_STD", 0.005)

    # optimiser
    matrix_lr = _env("MATRIX_LR", 0.026)
    embed_lr = _env("TIED_EMBED_LR", 0.03)
    scalar_lr = _env("SCALAR_LR", 0.02)
    muon_momentum = _env("MUON_MOMENTUM", 0.97)
    muon_momentum_start = _env("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_steps = _env("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_steps = _env("MUON_BACKEND_STEPS", 5)
    muon_wd = _env("MUON_WD", 0.095)
    embed_wd = _env("EMBED_WD", 0.085)
    adam_wd = _env("ADAM_WD", 0.02)
    beta1 = _env("BETA1", 0.9)
    beta2 = _env("BETA2", 0.99)
    grad_clip = _env("GRAD_CLIP_NORM", 0.3)
    ema_decay = _env("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = _env("MATRIX_BITS", 6)
    embed_bits = _env("EMBED_BITS", 7)
    matrix_clip_sigmas = _env("MATRIX_CLIP_SIGMAS", 12.85)
    mlp_clip_sigmas = _env("MLP_CLIP_SIGMAS", 11.5)
    embed_clip_sigmas = _env("EMBED_CLIP_SIGMAS", 15.0)
    gptq_batches = _env("GPTQ_CALIBRATION_BATCHES", 16)
    gptq_damp = _env("GPTQ_DAMP", 0.01)
    gptq_block = _env("GPTQ_BLOCK", 128)
    lqer_rank = _env("LQER_RANK", 4)
    lqer_top_k = _env("LQER_TOP_K", 3)

    # evaluation
    eval_seq_len = _env("EVAL_SEQ_LEN", 2048)
    eval_stride = _env("EVAL_STRIDE", 64)
    val_batch_tokens = _env("VAL_BATCH_TOKENS", 65_536)
    ttt_enabled = _env("TTT_ENABLED", True)
    ttt_slots = _env("TTT_SLOTS", 64)
    ttt_chunk = _env("TTT_CHUNK_SIZE", 48)
    ttt_lr = _env("TTT_LORA_LR", 1e-4)
    ttt_rank = _env("TTT_LORA_RANK", 80)
    ttt_alpha = _env("TTT_LORA_ALPHA", 144.0)
    ttt_wd = _env("TTT_WEIGHT_DECAY", 0.5)
    ttt_beta1 = _env("TTT_BETA1", 0.0)
    ttt_beta2 = _env("TTT_BETA2", 0.99)
    phase_docs = _env("PHASED_TTT_PREFIX_DOCS", 2500)
    num_phases = _env("PHASED_TTT_NUM_PHASES", 3)
    global_lr = _env("GLOBAL_TTT_LR", 1e-3)
    global_momentum = _env("GLOBAL_TTT_MOMENTUM", 0.9)
    global_chunk = _env("GLOBAL_TTT_CHUNK_TOKENS", 32_768)
    global_seqs = _env("GLOBAL_TTT_BATCH_SEQS", 4)
    eval_budget_seconds = _env("EVAL_BUDGET_SECONDS", 600.0)

    # token-only tilt
    tilt_enabled = _env("TILT_ENABLED", True)
    tilt_beta = _env("TILT_BETA", 1.9)
    tilt_bits = _env("TILT_TABLE_BITS", 22)
    tilt_min_count = _env("TILT_MIN_COUNT", 2)

    size_limit = 16_000_000


SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
BOS = 1


# ---------------------------------------------------------------------------------------------
# process group and log
# ---------------------------------------------------------------------------------------------


class Team:
    """Rank, world size and the few collectives we use. Works with a single process too."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.on = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if 8 % self.world:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.on:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def main(self):
        return self.rank == 0

    def sum_(self, t: Tensor) -> Tensor:
        if self.on and self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return t

    def max_(self, t: Tensor) -> Tensor:
        if self.on and self.world > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t

    def bcast_(self, t: Tensor) -> Tensor:
        if self.on and self.world > 1:
            dist.broadcast(t, src=0)
        return t

    def barrier(self):
        if self.on:
            dist.barrier()

    def close(self):
        if self.on:
            dist.destroy_process_group()


class Log:
    def __init__(self, team: Team, run_id: str):
        self.team = team
        self.path = None
        if team.main:
            os.makedirs("logs", exist_ok=True)
            self.path = f"logs/{run_id}.txt"
            print(self.path)

    def __call__(self, msg, console=True):
        if not self.team.main:
            return
        if console:
            print(msg, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ---------------------------------------------------------------------------------------------
# shards
# ---------------------------------------------------------------------------------------------


def read_shard(path) -> Tensor:
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard")
    n = int(header[2])
    body = np.fromfile(path, dtype="<u2", count=n, offset=HEADER_INTS * 4)
    if body.size != n:
        raise ValueError(f"{path}: short read, {body.size} of {n}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"nothing matches {pattern}")
    return files


class TokenStream:
    """Walks the training shards one after the other and starts over at the end."""

    def __init__(self, pattern: str):
        self.files = list_shards(pattern)
        self.which = 0
        self.pos = 0
        self.tokens = read_shard(self.files[0])

    def _next_file(self):
        self.which = (self.which + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.which])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self._next_file()
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def doc_cuts(x: Tensor, max_len: int, bucket: int = 64):
    """cu_seqlens for a packed row: a cut at each BOS, and long documents cut every max_len tokens.

    Padded with the row's end to a multiple of `bucket`, so that torch.compile sees few shapes.
    """
    n = x.numel()
    heads = (x == BOS).nonzero().flatten().tolist()
    if not heads or heads[0] != 0:
        heads = [0] + heads
    cuts = []
    for a, b in zip(heads, heads[1:] + [n]):
        cuts.extend(range(a, b, max_len))
    cuts.append(n)
    size = -(-len(cuts) // bucket) * bucket
    cuts.extend([n] * (size - len(cuts)))
    return torch.tensor(cuts, dtype=torch.int32)


class PackedLoader:
    """Every rank takes its slice of one common span, plus a token for the shift."""

    def __init__(self, pattern: str, team: Team, seq_len: int):
        self.stream = TokenStream(pattern)
        self.team = team
        self.seq_len = seq_len

    def next(self, local_tokens: int):
        span = local_tokens + 1
        chunk = self.stream.take(span * self.team.world)
        mine = chunk[self.team.rank * span : (self.team.rank + 1) * span].to(torch.int64)
        x, y = mine[:-1], mine[1:]
        cu = doc_cuts(x, self.seq_len)
        dev = self.team.device
        return (
            x.pin_memory().to(dev, non_blocking=True)[None],
            y.pin_memory().to(dev, non_blocking=True)[None],
            cu.pin_memory().to(dev, non_blocking=True),
        )


# ---------------------------------------------------------------------------------------------
# validation: tokens, bytes, documents
# ---------------------------------------------------------------------------------------------


def sp_byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int):
    """Only for plain (not CaseOps) tokenizers: bytes per piece, leading space, boundary tokens."""
    size = max(int(sp.vocab_size()), vocab_size)
    base = np.zeros(size, dtype=np.int16)
    space = np.zeros(size, dtype=bool)
    boundary = np.ones(size, dtype=bool)
    for i in range(int(sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    return base, space, boundary


class ValText:
    """The whole validation split: tokens, original bytes of each token, and where documents start."""

    def __init__(self, cfg: Settings, device):
        paths = [p for p in list_shards(cfg.val_files) if "_bytes_" not in os.path.basename(p)]
        host = torch.cat([read_shard(p) for p in paths]).contiguous()
        self.np_tokens = host.numpy()
        self.n = host.numel()
        self.tokens = host.to(torch.int32).to(device)
        if cfg.caseops:
            nbytes = self._sidecar(cfg)
        else:
            nbytes = self._from_tables(cfg)
        self.nbytes = nbytes.to(device)
        self.docs = self._documents()

    def _sidecar(self, cfg) -> Tensor:
        side = torch.cat([read_shard(p) for p in list_shards(cfg.val_bytes_files)]).to(torch.int32)
        if side.numel() != self.n:
            raise ValueError(f"byte sidecar has {side.numel()} entries for {self.n} validation tokens")
        return side

    def _from_tables(self, cfg) -> Tensor:
        sp = spm.SentencePieceProcessor(model_file=cfg.tokenizer_path)
        if int(sp.vocab_size()) != cfg.vocab_size:
            raise ValueError(f"VOCAB_SIZE={cfg.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
        base, space, boundary = sp_byte_tables(sp, cfg.vocab_size)
        t = self.np_tokens.astype(np.int64)
        out = base[t].astype(np.int32)
        # a leading space is a byte of text unless the piece follows a boundary token
        out[1:] += (space[t[1:]] & ~boundary[t[:-1]]).astype(np.int32)
        return torch.from_numpy(out)

    def _documents(self):
        """(start, number of targets). The targets of a document end with the BOS that follows it."""
        heads = np.flatnonzero(self.np_tokens == BOS).tolist()
        if not heads or heads[0] != 0:
            heads = [0] + heads
        ends = heads[1:] + [self.n - 1]
        return [(a, b - a) for a, b in zip(heads, ends) if b > a]


class Board:
    """Per-document sums in fp64. Whoever scores a target adds it here once."""

    def __init__(self, text: ValText, team: Team):
        self.text = text
        self.team = team
        m = len(text.docs)
        dev = team.device
        self.nll = torch.zeros(m, dtype=torch.float64, device=dev)
        self.bytes = torch.zeros(m, dtype=torch.float64, device=dev)
        self.count = torch.zeros(m, dtype=torch.float64, device=dev)

    def add(self, doc_ids: Tensor, nll: Tensor, where: Tensor, mask: Tensor):
        """doc_ids [S]; nll, where (target positions) and mask [S, C]."""
        m = mask.to(torch.float64)
        self.nll.index_add_(0, doc_ids, (nll.to(torch.float64) * m).sum(1))
        self.bytes.index_add_(0, doc_ids, (self.text.nbytes[where].to(torch.float64) * m).sum(1))
        self.count.index_add_(0, doc_ids, m.sum(1))

    def totals(self):
        t = torch.stack([self.nll.sum(), self.bytes.sum(), self.count.sum()])
        self.team.sum_(t)
        return t.tolist()

    def result(self):
        nll, nbytes, count = self.totals()
        return nll / count, nll / math.log(2.0) / nbytes, int(count), int(nbytes)


# ---------------------------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------------------------


class CastedLinear(nn.Linear):
    """fp32 master weight, used in the dtype of the input."""

    def __init__(self, fan_in, fan_out, zero=False):
        super().__init__(fan_in, fan_out, bias=False)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rope(nn.Module):
    def __init__(self, dims: int, base: float):
        super().__init__()
        inv = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("inv", inv, persistent=False)

    def forward(self, n: int, device, dtype):
        t = torch.arange(n, device=device, dtype=torch.float32)
        f = torch.outer(t, self.inv)
        return f.cos()[None, :, None].to(dtype), f.sin()[None, :, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d = cos.size(-1) * 2
    r, keep = x[..., :d], x[..., d:]
    a, b = r.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, keep], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: takes the direction of a token's own value out of what attention returned."""
    b, t, h, d = y.shape
    kv = v.size(2)
    yg = y.reshape(b, t, kv, h // kv, d)
    vn = F.normalize(v, dim=-1).unsqueeze(3)
    return (yg - (yg * vn).sum(-1, keepdim=True) * vn).reshape(b, t, h, d)


class Attention(nn.Module):
    def __init__(self, cfg: Settings, xsa: bool):
        super().__init__()
        d = cfg.model_dim
        self.h, self.kv = cfg.num_heads, cfg.num_kv_heads
        self.hd = d // self.h
        self.q = CastedLinear(d, d)
        self.k = CastedLinear(d, self.kv * self.hd)
        self.v = CastedLinear(d, self.kv * self.hd)
        self.o = CastedLinear(d, d, zero=True)
        self.q_gain = nn.Parameter(torch.full((self.h,), cfg.qk_gain))
        # sparse gate: reads only the first few channels of the residual
        self.gate_window = cfg.gate_window
        self.gate_scale = cfg.sparse_gate_scale
        self.attn_gate_w = nn.Parameter(torch.zeros(self.h, cfg.gate_window))
        self.xsa = xsa

    def forward(self, x, cos, sin, cu, max_len, lora):
        b, t, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if lora is not None:
            q = q + lora["q"](x)
            v = v + lora["v"](x)
        q = rms(q.view(b, t, self.h, self.hd))
        k = rms(k.view(b, t, self.kv, self.hd))
        v = v.view(b, t, self.kv, self.hd)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if cu is not None:
            y = flash_attn_varlen_func(
                q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max_len, max_seqlen_k=max_len, causal=True
            )[None]
        else:
            y = flash_attn_func(q, k, v, causal=True)
        if self.xsa:
            y = exclude_self(y, v)
        gate = 2.0 * torch.sigmoid(self.gate_scale * F.linear(x[..., : self.gate_window], self.attn_gate_w.to(x.dtype)))
        y = (y * gate.unsqueeze(-1)).reshape(b, t, -1)
        out = self.o(y)
        if lora is not None:
            out = out + lora["o"](y)
        return out


class MLP(nn.Module):
    def __init__(self, cfg: Settings):
        super().__init__()
        hidden = int(cfg.mlp_mult * cfg.model_dim)
        self.fc = CastedLinear(cfg.model_dim, hidden)
        self.proj = CastedLinear(hidden, cfg.model_dim, zero=True)

    def forward(self, x, lora):
        u = self.fc(x)
        if lora is not None:
            u = u + lora["fc"](x)
        return self.proj(F.leaky_relu(u, 0.5).square())


class Block(nn.Module):
    def __init__(self, cfg: Settings, index: int):
        super().__init__()
        self.attn = Attention(cfg, xsa=index >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim)]))
        self.ln_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x, x0, cos, sin, cu, max_len, lora):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms(x) * self.ln_scale, cos, sin, cu, max_len, lora)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms(x) * self.ln_scale, lora)
        return x


class SmearGate(nn.Module):
    """x_t += lam * sigmoid(w . x_t[:12]) * x_{t-1}, never across the start of a document."""

    def __init__(self, cfg: Settings):
        super().__init__()
        self.window = cfg.gate_window
        self.smear_w = nn.Parameter(torch.zeros(1, cfg.gate_window))
        self.smear_lambda = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = self.smear_lambda.to(x.dtype) * torch.sigmoid(F.linear(x[:, 1:, : self.window], self.smear_w.to(x.dtype)))
        inside = (ids[:, 1:] != BOS).unsqueeze(-1).to(x.dtype)
        return torch.cat([x[:, :1], x[:, 1:] + g * inside * x[:, :-1]], dim=1)


class GPT(nn.Module):
    def __init__(self, cfg: Settings):
        super().__init__()
        self.cfg = cfg
        self.softcap = cfg.logit_softcap
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        nn.init.normal_(self.tok_emb.weight, std=cfg.tied_init_std)
        self.smear = SmearGate(cfg)
        self.rope = Rope(cfg.rope_dims, cfg.rope_base)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        plain = list(range(cfg.num_layers))
        body = list(range(cfg.loop_start, cfg.loop_end + 1))
        looped = plain[: cfg.loop_start] + body * (cfg.num_loops + 1) + plain[cfg.loop_end + 1 :]
        self.orders = {False: plain, True: looped}
        self.looping = False
        self.skip_w = nn.Parameter(torch.ones(len(looped) // 2, cfg.model_dim))
        self.skip_gate = nn.Parameter(torch.zeros(len(looped) // 2, cfg.model_dim))

    def hidden(self, ids: Tensor, cu=None, max_len=0, lora=None) -> Tensor:
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = rms(self.smear(x, ids))
        x0 = x
        cos, sin = self.rope(ids.size(1), ids.device, x.dtype)
        order = self.orders[self.looping]
        half = len(order) // 2
        stack = []
        for pos, i in enumerate(order):
            if pos >= len(order) - half:
                j = pos - (len(order) - half)
                past = self.skip_w[j].to(x.dtype) * stack.pop()
                x = torch.lerp(past, x, torch.sigmoid(self.skip_gate[j]).to(x.dtype))
            x = self.blocks[i](x, x0, cos, sin, cu, max_len, None if lora is None else lora.block(i))
            if pos < half:
                stack.append(x)
        return rms(x)

    def head(self, h: Tensor, lora=None) -> Tensor:
        z = F.linear(h, self.tok_emb.weight.to(h.dtype))
        if lora is not None:
            z = z + lora.head(h)
        z = z.float()
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor, cu: Tensor, max_len: int) -> Tensor:
        """Mean loss over a packed row."""
        z = self.head(self.hidden(ids, cu, max_len))
        return F.cross_entropy(z.flatten(0, 1), targets.flatten())

    def token_logp(self, ids: Tensor, cu: Tensor, max_len: int) -> Tensor:
        return F.log_softmax(self.head(self.hidden(ids, cu, max_len)), dim=-1)


# ---------------------------------------------------------------------------------------------
# optimisers
# ---------------------------------------------------------------------------------------------

# Polar Express coefficients, five steps
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.compile
def orthogonalize(g: Tensor, steps: int) -> Tensor:
    x = g.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / (x.norm() * 1.02 + 1e-6)
    for a, b, c in _POLAR[:steps]:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices dealt out over the ranks; one flat all-reduce brings the updates together."""

    def __init__(self, params, team: Team, lr, momentum, steps, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.team = team

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            ps = group["params"]
            flat = torch.zeros(sum(p.numel() for p in ps), device=self.team.device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(ps):
                if i % self.team.world == self.team.rank and p.grad is not None:
                    st = self.state[p]
                    if "buf" not in st:
                        st["buf"] = torch.zeros_like(p.grad)
                    buf = st["buf"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = orthogonalize(g / (g.norm(dim=1, keepdim=True) + 1e-7), group["steps"])
                    g = g * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.flatten()
                at += p.numel()
            self.team.sum_(flat)
            at = 0
            for p in ps:
                u = flat[at : at + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"])
                at += p.numel()


class Optim:
    def __init__(self, model: GPT, cfg: Settings, team: Team):
        mats, scalars = [], []
        for name, p in model.named_parameters():
            if name == "tok_emb.weight":
                continue
            if p.ndim == 2 and name.startswith("blocks.") and p.numel() > 4 * cfg.model_dim and "gate" not in name:
                mats.append(p)
            else:
                scalars.append(p)
        betas = (cfg.beta1, cfg.beta2)
        self.embed = torch.optim.AdamW(
            [model.tok_emb.weight], lr=cfg.embed_lr, betas=betas, weight_decay=cfg.embed_wd, fused=True
        )
        self.scalar = torch.optim.AdamW(scalars, lr=cfg.scalar_lr, betas=betas, weight_decay=cfg.adam_wd, fused=True)
        self.muon = Muon(mats, team, cfg.matrix_lr, cfg.muon_momentum, cfg.muon_steps, cfg.muon_wd)
        self.all = [self.embed, self.scalar, self.muon]
        for o in self.all:
            for g in o.param_groups:
                g["base_lr"] = g["lr"]
        self.params = [p for o in self.all for g in o.param_groups for p in g["params"]]
        self.cfg, self.team = cfg, team

    def sync(self):
        if self.team.world == 1:
            return
        grads = [p.grad for p in self.params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        at = 0
        for g in grads:
            g.copy_(flat[at : at + g.numel()].view_as(g))
            at += g.numel()

    def step(self, step: int, lr_scale: float):
        cfg = self.cfg
        f = min(step / max(cfg.muon_momentum_steps, 1), 1.0)
        for g in self.muon.param_groups:
            g["momentum"] = (1 - f) * cfg.muon_momentum_start + f * cfg.muon_momentum
        for o in self.all:
            for g in o.param_groups:
                g["lr"] = g["base_lr"] * lr_scale
        if cfg.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.params, cfg.grad_clip)
        for o in self.all:
            o.step()
            o.zero_grad(set_to_none=True)


class Ema:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.avg = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module):
        live = model.state_dict()
        keys = list(self.avg)
        torch._foreach_lerp_([self.avg[k] for k in keys], [live[k].float() for k in keys], 1.0 - self.decay)

    @torch.no_grad()
    def apply(self, model: nn.Module):
        live = model.state_dict()
        for k, v in self.avg.items():
            live[k].copy_(v.to(live[k].dtype))


# ---------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------


def lr_scale_at(cfg: Settings, frac: float) -> float:
    """Flat, then linear down to min_lr. frac: share of the time budget that is gone."""
    start = 1.0 - cfg.warmdown_frac
    if frac <= start:
        return 1.0
    return max(cfg.min_lr, 1.0 - (1.0 - cfg.min_lr) * (frac - start) / max(cfg.warmdown_frac, 1e-9))


class Clock:
    """Wall clock of a stage; what it says is synchronised with the device."""

    def __init__(self):
        torch.cuda.synchronize()
        self.t0 = time.perf_counter()

    def seconds(self, sync=True) -> float:
        if sync:
            torch.cuda.synchronize()
        return time.perf_counter() - self.t0


def train_step(model, opt, loader, cfg, team, step, scale):
    accum = 8 // team.world
    local = cfg.train_batch_tokens // (team.world * accum)
    total = torch.zeros((), device=team.device)
    for _ in range(accum):
        x, y, cu = loader.next(local)
        loss = model(x, y, cu, cfg.train_seq_len)
        (loss / accum).backward()
        total += loss.detach() / accum
    opt.sync()
    opt.step(step, scale)
    return total


def warm_compile(model, raw, opt, cfg, team, log):
    """Compiles both orders of the layers on the first batches, then puts everything back as it was."""
    keep = copy.deepcopy(raw.state_dict())
    keep_opt = [copy.deepcopy(o.state_dict()) for o in opt.all]
    loader = PackedLoader(cfg.train_files, team, cfg.train_seq_len)
    for flag in (False, True):
        raw.looping = flag
        for i in range(cfg.warmup_steps // 2):
            train_step(model, opt, loader, cfg, team, i, 1.0)
    raw.looping = False
    raw.load_state_dict(keep)
    for o, s in zip(opt.all, keep_opt):
        o.load_state_dict(s)
    log(f"warmup_step:{cfg.warmup_steps}/{cfg.warmup_steps}")


def train(raw: GPT, cfg: Settings, team: Team, log: Log, text: ValText):
    """Returns the loader (the calibration goes on where it stopped) and the running clock."""
    model = torch.compile(raw, dynamic=False, fullgraph=True)
    opt = Optim(raw, cfg, team)
    warm_compile(model, raw, opt, cfg, team, log)

    loader = PackedLoader(cfg.train_files, team, cfg.train_seq_len)
    ema = Ema(raw, cfg.ema_decay)
    budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
    team.barrier()
    clock = Clock()
    step, stop_at = 0, None
    while True:
        last = step == cfg.iterations or (stop_at is not None and step >= stop_at)
        if cfg.val_loss_every > 0 and step % cfg.val_loss_every == 0 and not last:
            vl, vb, _, _ = eval_packed(raw, cfg, team, text)
            log(f"step:{step}/{cfg.iterations} val_loss:{vl:.4f} val_bpb:{vb:.4f}")
        if last:
            break
        gone = clock.seconds(sync=False)
        frac = min(gone / budget, 1.0)
        if not raw.looping and frac >= cfg.loop_at:
            raw.looping = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{raw.orders[True]}")
        loss = train_step(model, opt, loader, cfg, team, step, lr_scale_at(cfg, frac))
        ema.update(raw)
        step += 1
        over = torch.tensor(float(clock.seconds() >= budget), device=team.device)
        if team.max_(over).item() > 0 and stop_at is None:
            stop_at = step
        if step <= 5 or step % cfg.train_log_every == 0:
            ms = 1000.0 * clock.seconds()
            log(f"step:{step}/{cfg.iterations} train_loss:{loss.item():.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
    log(f"stopping_early: wallclock_cap train_time:{1000 * clock.seconds():.0f}ms step:{step}/{cfg.iterations}")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    ema.apply(raw)
    log("ema: applying EMA weights")
    return loader, clock


# ---------------------------------------------------------------------------------------------
# quantisation: GPTQ, then LQER on the worst tensors
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def collect_hessians(model: GPT, loader: PackedLoader, cfg: Settings, team: Team, clock: Clock, log: Log):
    """Second moments of the inputs of each matrix, over training batches. Ends with the training cap at the latest."""
    hess: dict[str, Tensor] = {}
    hooks = []

    def grab(name):
        def hook(_mod, args, _out=None):
            x = args[0].reshape(-1, args[0].size(-1)).float()
            if name not in hess:
                hess[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            hess[name].addmm_(x.T, x)

        return hook

    for name, mod in model.named_modules():
        if isinstance(mod, CastedLinear):
            hooks.append(mod.register_forward_hook(grab(name + ".weight")))
    used = 0
    for _ in range(cfg.gptq_batches):
        late = torch.tensor(float(clock.seconds() > cfg.max_wallclock_seconds - 16.0), device=team.device)
        if team.max_(late).item() > 0:
            break
        x, _, cu = loader.next(cfg.train_batch_tokens // 8)
        h = model.hidden(x, cu, cfg.train_seq_len)
        grab("tok_emb.weight")(None, (h,))
        used += 1
    for hook in hooks:
        hook.remove()
    for name in sorted(hess):
        team.sum_(hess[name])
        hess[name] /= max(used * team.world, 1)
    log(f"gptq:calibrated on {used} train batches, clock {clock.seconds():.1f}s")
    return hess


def gptq(w: Tensor, hessian: Tensor, bits: int, sigmas: float, damp: float, block: int):
    """Row scales from sigma clipping; columns in order of falling activation, errors pushed to the right."""
    w = w.detach().float().clone()
    rows, cols = w.shape
    top = 2 ** (bits - 1) - 1
    scale = (sigmas * w.std(dim=1) / top).clamp_min(1e-8).to(torch.float16).float()
    h = hessian.clone().float()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(damp * h.diagonal().mean())
    perm = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(perm)
    w, h = w[:, perm], h[perm][:, perm]
    inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inv, upper=True)
    q = torch.zeros_like(w, dtype=torch.int8)
    for a in range(0, cols, block):
        b = min(a + block, cols)
        wb = w[:, a:b].clone()
        err = torch.zeros_like(wb)
        for j in range(b - a):
            col = wb[:, j]
            d = u[a + j, a + j]
            qi = torch.round(col / scale).clamp(-top, top)
            q[:, a + j] = qi.to(torch.int8)
            e = (col - qi * scale) / d
            err[:, j] = e
            wb[:, j:] -= e[:, None] * u[a + j, a + j : b][None]
        w[:, b:] -= err @ u[a:b, b:]
    return q[:, back].contiguous(), scale


def small_quant(t: Tensor, bits: int):
    top = 2 ** (bits - 1) - 1
    s = (t.abs().amax(dim=1, keepdim=True) / top).clamp_min(1e-8).to(torch.float16)
    return torch.round(t / s.float()).clamp(-top, top).to(torch.int8), s.squeeze(1)


def role_of(name: str) -> str:
    if name == "tok_emb.weight":
        return "embed"
    for key in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc", "mlp.proj"):
        if key + ".weight" in name:
            return key
    return "small"


@torch.no_grad()
def quantize(model: GPT, hess: dict[str, Tensor], cfg: Settings, log: Log) -> dict[str, Tensor]:
    """Flat dict of tensors to be stored: NAME|q, NAME|s, NAME|la.., or NAME|raw."""
    out: dict[str, Tensor] = {}
    residue: dict[str, Tensor] = {}
    for name, w in model.state_dict().items():
        if name not in hess:
            out[name + "|raw"] = w.detach().to(torch.float16).cpu()
            continue
        role = role_of(name)
        if role == "embed":
            bits, sig = cfg.embed_bits, cfg.embed_clip_sigmas
        elif role.startswith("mlp"):
            bits, sig = cfg.matrix_bits, cfg.mlp_clip_sigmas
        else:
            bits, sig = cfg.matrix_bits, cfg.matrix_clip_sigmas
        q, s = gptq(w, hess[name], bits, sig, cfg.gptq_damp, cfg.gptq_block)
        out[name + "|q"], out[name + "|s"] = q.cpu(), s.to(torch.float16).cpu()
        residue[name] = w.float() - q.float() * s[:, None]
    worst = sorted(residue, key=lambda k: -float(residue[k].norm()))[: cfg.lqer_top_k]
    for name in worst:
        u, sv, vt = torch.linalg.svd(residue[name], full_matrices=False)
        r = cfg.lqer_rank
        left = (u[:, :r] * sv[:r].sqrt()).T.contiguous()
        right = (sv[:r].sqrt()[:, None] * vt[:r]).contiguous()
        for tag, m in (("a", left), ("b", right)):
            mq, ms = small_quant(m, 8)
            out[f"{name}|l{tag}q"], out[f"{name}|l{tag}s"] = mq.cpu(), ms.cpu()
    log(f"lqer: rank {cfg.lqer_rank} on {worst}")
    return out


def dequantize(store: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, t in store.items():
        name, tag = key.split("|")
        if tag == "raw":
            state[name] = t.float()
        elif tag == "q":
            w = t.float() * store[name + "|s"].float()[:, None]
            if name + "|laq" in store:
                left = store[name + "|laq"].float() * store[name + "|las"].float()[:, None]
                right = store[name + "|lbq"].float() * store[name + "|lbs"].float()[:, None]
                w = w + left.T @ right
            state[name] = w
    return state


# ---------------------------------------------------------------------------------------------
# artifact: one stream per group, each with the codec that packs it best
# ---------------------------------------------------------------------------------------------

_ART_MAGIC = b"TIR3"
_DTYPES = {"int8": np.int8, "float16": np.float16}
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}]


def _squeeze(raw: bytes):
    cands = {
        "b": brotli.compress(raw, quality=11, lgwin=24),
        "x": lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS),
        "r": raw,
    }
    best = min(cands, key=lambda c: len(cands[c]))
    return best, cands[best]


def _unsqueeze(codec: str, blob: bytes) -> bytes:
    if codec == "b":
        return brotli.decompress(blob)
    if codec == "x":
        return lzma.decompress(blob, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    return blob


def pack_artifact(store: dict[str, Tensor]) -> bytes:
    groups: dict[str, list[str]] = {}
    for key in store:
        name, tag = key.split("|")
        label = role_of(name) if tag == "q" else ("scales" if tag == "s" else "rest")
        groups.setdefault(label, []).append(key)
    meta, blobs = [], []
    for label in sorted(groups):
        raw = io.BytesIO()
        items = []
        for key in groups[label]:
            a = store[key].numpy()
            # columns of a matrix are more alike than its rows
            flip = a.ndim == 2 and a.dtype == np.int8
            raw.write(np.ascontiguousarray(a.T if flip else a).tobytes())
            items.append([key, a.dtype.name, list(a.shape), int(flip)])
        codec, blob = _squeeze(raw.getvalue())
        meta.append([label, codec, len(blob), items])
        blobs.append(blob)
    head = brotli.compress(json.dumps(meta, separators=(",", ":")).encode(), quality=11)
    return _ART_MAGIC + struct.pack("<I", len(head)) + head + b"".join(blobs)


def unpack_artifact(data: bytes) -> dict[str, Tensor]:
    if data[:4] != _ART_MAGIC:
        raise ValueError("not a tiree artifact")
    (n,) = struct.unpack("<I", data[4:8])
    meta = json.loads(brotli.decompress(data[8 : 8 + n]))
    at = 8 + n
    store = {}
    for _label, codec, size, items in meta:
        raw = _unsqueeze(codec, data[at : at + size])
        at += size
        off = 0
        for key, dt, shape, flip in items:
            dtype = np.dtype(_DTYPES[dt])
            count = int(np.prod(shape)) if shape else 1
            a = np.frombuffer(raw, dtype=dtype, count=count, offset=off)
            off += count * dtype.itemsize
            a = a.reshape(shape[::-1]).T if flip else a.reshape(shape)
            store[key] = torch.from_numpy(np.ascontiguousarray(a).copy())
    return store


def write_artifact(model: GPT, hess, cfg: Settings, team: Team, log: Log):
    store = quantize(model, hess, cfg, log)
    if team.main:
        data = pack_artifact(store)
        with open(cfg.artifact_path, "wb") as f:
            f.write(data)
        code_bytes = len(Path(__file__).read_bytes())
        total = len(data) + code_bytes
        log(f"Serialized model quantized+per-group: {len(data)} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size: {total} bytes")
        if total > cfg.size_limit:
            raise RuntimeError(f"submission of {total} bytes is over {cfg.size_limit}")
    team.barrier()


def read_artifact(cfg: Settings, team: Team) -> GPT:
    with open(cfg.artifact_path, "rb") as f:
        state = dequantize(unpack_artifact(f.read()))
    model = GPT(cfg).to(team.device)
    model.load_state_dict(state)
    model.looping = True
    return model


# ---------------------------------------------------------------------------------------------
# tilt: a hint for the next token out of the tokens before it
# ---------------------------------------------------------------------------------------------

TILT_ORDERS = np.array([16, 10, 6], dtype=np.int64)


@njit
def _tilt_scan(tokens, orders, bits, bos, min_count, hint, conf):
    """One pass. hint[t], conf[t] come from tokens[:t]; only then does tokens[t] enter the tables."""
    n = tokens.shape[0]
    k = orders.shape[0]
    size = 1 << bits
    low = np.uint64(size - 1)
    prime = np.uint64(0x9E3779B97F4A7C15)
    check = np.zeros((k, size), dtype=np.uint32)
    guess = np.zeros((k, size), dtype=np.uint16)
    count = np.zeros((k, size), dtype=np.int16)
    slot = np.zeros(k, dtype=np.int64)
    tag = np.zeros(k, dtype=np.uint32)
    head = 0
    for t in range(1, n):
        if tokens[t - 1] == bos:
            head = t - 1
        best, best_c = -1, 0
        for j in range(k):
            slot[j] = -1
            if t - orders[j] < head:
                continue
            h = np.uint64(orders[j])
            for i in range(t - orders[j], t):
                h = (h ^ np.uint64(tokens[i])) * prime
                h = h ^ (h >> np.uint64(29))
            slot[j] = np.int64(h & low)
            tag[j] = np.uint32(h >> np.uint64(33))
            if best < 0 and check[j, slot[j]] == tag[j] and count[j, slot[j]] >= min_count:
                best = np.int64(guess[j, slot[j]])
                best_c = np.int64(count[j, slot[j]])
        hint[t] = best
        conf[t] = min(best_c, 255)
        y = tokens[t]
        for j in range(k):
            s = slot[j]
            if s < 0:
                continue
            if check[j, s] != tag[j]:
                check[j, s] = tag[j]
                guess[j, s] = y
                count[j, s] = 1
            elif guess[j, s] == y:
                count[j, s] = min(count[j, s] + 1, 30000)
            else:
                count[j, s] -= 1
                if count[j, s] <= 0:
                    guess[j, s] = y
                    count[j, s] = 1


class Tilt:
    """p'(a) = p(a) exp(beta [a = hint]) / (1 + p(hint) (exp(beta) - 1)), a distribution over the vocabulary."""

    def __init__(self, cfg: Settings, text: ValText, log: Log):
        n = text.n
        hint = np.full(n, -1, dtype=np.int32)
        conf = np.zeros(n, dtype=np.uint8)
        if cfg.tilt_enabled:
            t0 = time.perf_counter()
            _tilt_scan(text.np_tokens, TILT_ORDERS, cfg.tilt_bits, BOS, cfg.tilt_min_count, hint, conf)
            log(f"tilt: {int((hint >= 0).sum())} hints in {time.perf_counter() - t0:.1f}s")
        dev = text.tokens.device
        self.hint = torch.from_numpy(hint).to(dev)
        # the longer a context has held, the stronger the push
        strength = cfg.tilt_beta * (1.0 - np.exp(-np.arange(256) / 2.0))
        self.table = torch.tensor(strength, dtype=torch.float32, device=dev)
        self.conf = torch.from_numpy(conf).to(dev)

    def nll(self, logp: Tensor, targets: Tensor, where: Tensor) -> Tensor:
        """logp [..., V] of the targets [...] that stand at `where` in the stream."""
        hint = self.hint[where].long()
        beta = self.table[self.conf[where].long()] * (hint >= 0)
        p_hint = logp.gather(-1, hint.clamp_min(0).unsqueeze(-1)).squeeze(-1).exp()
        gold = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        norm = torch.log1p(p_hint * torch.expm1(beta))
        return -(gold + beta * (targets == hint) - norm)


# ---------------------------------------------------------------------------------------------
# evaluation without adaptation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def eval_packed(model: GPT, cfg: Settings, team: Team, text: ValText, tilt: Tilt | None = None):
    """Packed spans of the stream, no window overlaps. Cheap, for diagnosis. Each target once."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=team.device)
    span = cfg.val_batch_tokens
    total = text.n - 1
    for i, a in enumerate(range(0, total, span)):
        if i % team.world != team.rank:
            continue
        b = min(a + span, total)
        x = text.tokens[a:b].long()
        y = text.tokens[a + 1 : b + 1].long()
        cu = doc_cuts(x, cfg.eval_seq_len).to(team.device)
        logp = model.token_logp(x[None], cu, cfg.eval_seq_len)[0]
        if tilt is None:
            nll = -logp.gather(-1, y[:, None]).squeeze(-1)
        else:
            nll = tilt.nll(logp, y, torch.arange(a + 1, b + 1, device=team.device))
        sums[0] += nll.double().sum()
        sums[1] += text.nbytes[a + 1 : b + 1].double().sum()
        sums[2] += b - a
    team.sum_(sums)
    nll, nbytes, count = sums.tolist()
    model.train()
    return nll / count, nll / math.log(2.0) / nbytes, int(count), int(nbytes)


def window_of(ci: int, length: int, chunk: int, ctx: int):
    """Chunk ci of a document of `length` targets: (start of the input window, its length, offset of the chunk, chunk length)."""
    c0 = ci * chunk
    c1 = min(c0 + chunk, length)
    w0 = max(0, c1 - ctx)
    return w0, c1 - w0, c0 - w0, c1 - c0


def gather_windows(text: ValText, rows, chunk: int):
    """rows: (stream position of the window, length, offset, chunk length). Padding is BOS, after the window's end."""
    dev = text.tokens.device
    t = torch.tensor(rows, dtype=torch.int64, device=dev)
    base, length, off, clen = t.unbind(1)
    width = -(-int(max(r[1] for r in rows)) // 256) * 256
    ar = torch.arange(width, device=dev)
    idx = (base[:, None] + ar).clamp_max(text.n - 1)
    ids = torch.where(ar < length[:, None], text.tokens[idx].long(), torch.full_like(idx, BOS))
    ac = torch.arange(chunk, device=dev)
    mask = ac < clen[:, None]
    pos = torch.where(mask, off[:, None] + ac, torch.zeros_like(ac))
    where = base[:, None] + pos + 1
    return ids, pos, where, mask


def pick(h: Tensor, pos: Tensor) -> Tensor:
    return h.gather(1, pos.unsqueeze(-1).expand(-1, -1, h.size(-1)))


@torch.no_grad()
def eval_sliding(model: GPT, cfg: Settings, team: Team, text: ValText, tilt: Tilt, log: Log):
    """Windows of eval_seq_len inside each document, moved by eval_stride; only the new targets count."""
    model.eval()
    board = Board(text, team)
    stride, batch = cfg.eval_stride, cfg.ttt_slots
    rows, owners = [], []

    def flush():
        ids, pos, where, mask = gather_windows(text, rows, stride)
        logp = F.log_softmax(model.head(pick(model.hidden(ids), pos)), dim=-1)
        nll = tilt.nll(logp, text.tokens[where].long(), where)
        board.add(torch.tensor(owners, device=team.device), nll, where, mask)
        rows.clear()
        owners.clear()

    for d in range(team.rank, len(text.docs), team.world):
        start, length = text.docs[d]
        for ci in range(-(-length // stride)):
            w0, wlen, off, clen = window_of(ci, length, stride, cfg.eval_seq_len)
            rows.append((start + w0, wlen, off, clen))
            owners.append(d)
            if len(rows) == batch:
                flush()
    if rows:
        flush()
    return board.result()


# ---------------------------------------------------------------------------------------------
# test-time training: a LoRA per document, in slots
# ---------------------------------------------------------------------------------------------


class SlotLora(nn.Module):
    """One low-rank pair per slot: y_s = (x_s A_s^T) B_s^T * scale."""

    def __init__(self, slots: int, fan_in: int, fan_out: int, rank: int, alpha: float, gen: torch.Generator, device):
        super().__init__()
        bound = 1.0 / math.sqrt(fan_in)
        proto = (torch.rand(rank, fan_in, generator=gen) * 2 - 1) * bound
        self.register_buffer("proto", proto.to(device), persistent=False)
        self.A = nn.Parameter(self.proto.expand(slots, -1, -1).clone())
        self.B = nn.Parameter(torch.zeros(slots, fan_out, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        return torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2)) * self.scale

    @torch.no_grad()
    def clear(self, rows: Tensor):
        self.A[rows] = self.proto
        self.B[rows] = 0.0


class LoraSet(nn.Module):
    def __init__(self, cfg: Settings, device):
        super().__init__()
        gen = torch.Generator().manual_seed(cfg.seed)
        d, kvd = cfg.model_dim, cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)
        outs = {"q": (d, d), "v": (d, kvd), "o": (d, d), "fc": (d, int(cfg.mlp_mult * d))}

        def new(fan_in, fan_out):
            return SlotLora(cfg.ttt_slots, fan_in, fan_out, cfg.ttt_rank, cfg.ttt_alpha, gen, device)

        self.layers = nn.ModuleList(
            nn.ModuleDict({k: new(*v) for k, v in outs.items()}) for _ in range(cfg.num_layers)
        )
        self.head = new(d, cfg.vocab_size)

    def block(self, i: int):
        return self.layers[i]

    def clear(self, rows: Tensor):
        for m in self.modules():
            if isinstance(m, SlotLora):
                m.clear(rows)


class SlotAdam:
    """AdamW whose moments and step counts belong to slots, so that a document starts with fresh ones."""

    def __init__(self, params, cfg: Settings):
        self.ps = list(params)
        self.m = [torch.zeros_like(p) for p in self.ps]
        self.v = [torch.zeros_like(p) for p in self.ps]
        self.t = torch.zeros(self.ps[0].size(0), device=self.ps[0].device)
        self.lr, self.wd = cfg.ttt_lr, cfg.ttt_wd
        self.b1, self.b2 = cfg.ttt_beta1, cfg.ttt_beta2

    @torch.no_grad()
    def clear(self, rows: Tensor):
        for m, v in zip(self.m, self.v):
            m[rows] = 0.0
            v[rows] = 0.0
        self.t[rows] = 0.0

    @torch.no_grad()
    def step(self, live: Tensor):
        """live [S]: which slots move."""
        on = live.to(torch.float32)
        self.t += on
        t = self.t.clamp_min(1.0)[:, None, None]
        lr = (self.lr * on)[:, None, None]
        for p, m, v in zip(self.ps, self.m, self.v):
            m.lerp_(p.grad, 1.0 - self.b1)
            v.lerp_(p.grad.square(), 1.0 - self.b2)
            mh = m / (1.0 - self.b1**t)
            vh = v / (1.0 - self.b2**t)
            p.mul_(1.0 - lr * self.wd)
            p.sub_(lr * mh / (vh.sqrt() + 1e-8))
            p.grad = None


class SlotRunner:
    """Keeps `slots` documents going side by side on a rank. A slot that ends its document takes the next one."""

    def __init__(self, model: GPT, cfg: Settings, text: ValText, tilt: Tilt, board: Board):
        self.model, self.cfg, self.text, self.tilt, self.board = model, cfg, text, tilt, board
        self.dev = text.tokens.device
        self.lora = LoraSet(cfg, self.dev)
        self.adam = SlotAdam(self.lora.parameters(), cfg)
        self.slots: list[list[int] | None] = [None] * cfg.ttt_slots

    def refill(self, queue: deque):
        fresh = []
        for s, cur in enumerate(self.slots):
            if cur is None and queue:
                self.slots[s] = [queue.popleft(), 0]
                fresh.append(s)
        if fresh:
            rows = torch.tensor(fresh, device=self.dev)
            self.lora.clear(rows)
            self.adam.clear(rows)

    def layout(self):
        """Rows for gather_windows, document of each slot, and which slots have chunks left after this one."""
        rows, owner, more = [], [], []
        for cur in self.slots:
            if cur is None:
                rows.append((0, 1, 0, 0))
                owner.append(0)
                more.append(False)
                continue
            d, ci = cur
            start, length = self.text.docs[d]
            w0, wlen, off, clen = window_of(ci, length, self.cfg.ttt_chunk, self.cfg.eval_seq_len)
            rows.append((start + w0, wlen, off, clen))
            owner.append(d)
            more.append((ci + 1) * self.cfg.ttt_chunk < length)
        return rows, torch.tensor(owner, device=self.dev), more

    def advance(self, more):
        for s, cur in enumerate(self.slots):
            if cur is not None:
                if more[s]:
                    cur[1] += 1
                else:
                    self.slots[s] = None

    def chunk_logp(self, ids, pos):
        h = pick(self.model.hidden(ids, lora=self.lora), pos)
        return F.log_softmax(self.model.head(h, self.lora), dim=-1)

    def one_chunk(self):
        rows, owner, more = self.layout()
        ids, pos, where, mask = gather_windows(self.text, rows, self.cfg.ttt_chunk)
        targets = self.text.tokens[where].long()
        logp = self.chunk_logp(ids, pos)
        with torch.no_grad():
            scored = self.tilt.nll(logp.detach(), targets, where)
            self.board.add(owner, scored, where, mask)
        if any(more):
            live = torch.tensor(more, device=self.dev)
            nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            per_doc = (nll * mask).sum(1) / mask.sum(1).clamp_min(1)
            (per_doc * live).sum().backward()
            self.adam.step(live)
        self.advance(more)

    def run(self, doc_ids):
        queue = deque(doc_ids)
        self.refill(queue)
        steps = 0
        while any(cur is not None for cur in self.slots):
            self.one_chunk()
            self.refill(queue)
            steps += 1
        return steps


def adapt_base(model: GPT, cfg: Settings, team: Team, text: ValText, first: int, stop: int, log: Log):
    """SGD of the base weights on documents first..stop-1, which all ranks have scored by now."""
    a = text.docs[first][0]
    b = text.docs[stop - 1][0] + text.docs[stop - 1][1]  # position of the last scored target
    params = [p for p in model.parameters()]
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=cfg.global_lr, momentum=cfg.global_momentum)
    spans = [(u, min(u + cfg.global_chunk, b)) for u in range(a, b, cfg.global_chunk)]
    seq = cfg.eval_seq_len
    for i, (u, v) in enumerate(spans):
        lr = cfg.global_lr * 0.5 * (1.0 + math.cos(math.pi * i / max(len(spans) - 1, 1)))
        for g in opt.param_groups:
            g["lr"] = lr
        starts = list(range(u, v, seq))
        for p in params:
            p.grad = torch.zeros_like(p)
        for s in starts[team.rank :: team.world]:
            e = min(s + seq, v)
            x = text.tokens[s:e].long()[None]
            y = text.tokens[s + 1 : e + 1].long()[None]
            cu = doc_cuts(x[0], seq).to(team.device)
            share = (e - s) / (v - u)
            (model(x, y, cu, seq) * share).backward()
        for p in params:
            team.sum_(p.grad)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
    for p in params:
        p.requires_grad_(False)
    log(f"ttp: global sgd on docs {first}..{stop - 1}, {len(spans)} steps")


def phase_bounds(cfg: Settings, total: int) -> list[int]:
    head = min(cfg.phase_docs, total)
    return [head * (i + 1) // cfg.num_phases for i in range(cfg.num_phases)] + [total]


def eval_phased_ttt(model: GPT, cfg: Settings, team: Team, text: ValText, tilt: Tilt, log: Log):
    """Score documents (each with its own LoRA), adapt the base on what has been scored, go on with the rest."""
    for p in model.parameters():
        p.requires_grad_(False)
    board = Board(text, team)
    runner = SlotRunner(model, cfg, text, tilt, board)
    clock = Clock()
    done = 0
    bounds = phase_bounds(cfg, len(text.docs))
    for phase, stop in enumerate(bounds):
        if stop <= done:
            continue
        steps = runner.run(range(done + team.rank, stop, team.world))
        team.barrier()
        loss, bpb, count, _ = board.result()
        log(f"ttt_phase:{phase + 1}/{len(bounds)} docs:{stop} tokens:{count} rl:{loss:.4f} rb:{bpb:.4f} steps:{steps} t:{clock.seconds():.1f}s")
        if stop < len(text.docs):
            adapt_base(model, cfg, team, text, done, stop, log)
        done = stop
    return board.result()


def warm_ttt(model: GPT, cfg: Settings, team: Team, log: Log):
    """Brings up kernels on made-up token ids, with a LoRA that is thrown away."""
    gen = torch.Generator().manual_seed(7)
    t0 = time.perf_counter()
    lora = LoraSet(cfg, team.device)
    for width in (256, cfg.eval_seq_len):
        ids = torch.randint(2, cfg.vocab_size, (cfg.ttt_slots, width), generator=gen).to(team.device)
        pos = torch.arange(cfg.ttt_chunk, device=team.device).expand(cfg.ttt_slots, -1)
        logp = F.log_softmax(model.head(pick(model.hidden(ids, lora=lora), pos), lora), dim=-1)
        (-logp[..., 0].mean()).backward()
    model.zero_grad(set_to_none=True)
    log(f"ttt_warmup: {time.perf_counter() - t0:.1f}s")


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------


def evaluate(cfg: Settings, team: Team, text: ValText, log: Log):
    """From the artifact on disk to the number we report."""
    warm = read_artifact(cfg, team)
    if cfg.ttt_enabled:
        warm_ttt(warm, cfg, team, log)
    del warm
    torch.cuda.empty_cache()

    team.barrier()
    clock = Clock()
    model = read_artifact(cfg, team)
    loss, bpb, _, _ = eval_packed(model, cfg, team, text)
    log(f"diagnostic quantized val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * clock.seconds():.0f}ms")

    tilt = Tilt(cfg, text, log)
    if cfg.ttt_enabled:
        label = "quantized_ttt_phased"
        result = eval_phased_ttt(model, cfg, team, text, tilt, log)
    else:
        label = "quantized_sliding"
        result = eval_sliding(model, cfg, team, text, tilt, log)
    loss, bpb, count, nbytes = result
    seconds = clock.seconds()
    log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
    log(f"scored_tokens:{count}/{text.n - 1} scored_bytes:{nbytes} documents:{len(text.docs)}")
    if count != text.n - 1:
        raise RuntimeError("not every target was scored exactly once")
    log(f"total_eval_time:{seconds:.1f}s budget:{cfg.eval_budget_seconds:.0f}s")
    if seconds > cfg.eval_budget_seconds:
        raise RuntimeError("evaluation ran over its budget")
    log(f"final val_loss:{loss:.8f} val_bpb:{bpb:.8f}")


def main():
    cfg = Settings()
    team = Team()
    log = Log(team, cfg.run_id)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    torch.cuda.manual_seed_all(cfg.seed)

    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log("=" * 80, console=False)
    log(f"Running Python {sys.version.split()[0]} PyTorch {torch.__version__}")
    for k in sorted(k for k in vars(Settings) if not k.startswith("_")):
        log(f"  {k}: {getattr(cfg, k)}", console=False)

    text = ValText(cfg, team.device)
    log(f"val_loader: tokens:{text.n - 1} documents:{len(text.docs)} bytes:{int(text.nbytes[1:].sum())}")
    model = GPT(cfg).to(team.device)
    for t in list(model.parameters()) + list(model.buffers()):
        team.bcast_(t.data)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world_size:{team.world} seed:{cfg.seed}")

    loader, clock = train(model, cfg, team, log, text)
    hess = collect_hessians(model, loader, cfg, team, clock, log)
    write_artifact(model, hess, cfg, team, log)
    log(f"train+gptq+artifact: {clock.seconds():.1f}s of {cfg.max_wallclock_seconds:.0f}s")
    del hess, loader

    # how much the quantisation costs, for the log only
    loss, bpb, _, _ = eval_packed(model, cfg, team, text)
    log(f"diagnostic pre-quantization post-ema val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    del model
    torch.cuda.empty_cache()

    evaluate(cfg, team, text, log)
    team.close()


if __name__ == "__main__":
    main()
