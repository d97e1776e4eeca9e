"""
Banked transformer for Parameter Golf (16 MB track).

All matrices of all layers live in four 3-D parameters ("banks"). Muon runs on the banks with an asynchronous
reduce_scatter, so that every rank orthogonalises only its own share of the slices. After training: EMA weights,
GPTQ int6 calibrated on train shards inside the 600 s, lzma. Evaluation: sliding windows, score-first test-time training.
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
    from flash_attn_interface import flash_attn_func as _fa3

    HAVE_FA3 = True
except ImportError:
    _fa3 = None
    HAVE_FA3 = False


# -----------------------------
# settings
# -----------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_bool(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


class Settings:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp4096")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_4096_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)

    # run length
    iterations = env_int("ITERATIONS", 20000)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.55)
    max_wallclock_s = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    calib_reserve_s = env_float("CALIB_RESERVE_SECONDS", 14.0)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786432)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    val_every = env_int("VAL_EVERY", 4000)
    log_every = env_int("LOG_EVERY", 500)

    # shape
    vocab_size = env_int("VOCAB_SIZE", 4096)
    num_layers = env_int("NUM_LAYERS", 10)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_hidden = env_int("MLP_HIDDEN", 1536)
    rope_base = env_float("ROPE_BASE", 10000.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    xsa_last = env_int("XSA_LAST", 4)
    softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain = env_float("QK_GAIN", 2.5)
    bigram_buckets = env_int("BIGRAM_BUCKETS", 2048)
    bigram_dim = env_int("BIGRAM_DIM", 96)
    value_dim = env_int("VALUE_DIM", 64)
    value_layers = tuple(int(v) for v in os.environ.get("VALUE_LAYERS", "8,9").split(",") if v)

    # optimiser
    bank_lr = env_float("BANK_LR", 0.025)
    bank_wd = env_float("BANK_WD", 0.06)
    bank_momentum = env_float("BANK_MOMENTUM", 0.98)
    bank_momentum_start = env_float("BANK_MOMENTUM_START", 0.92)
    bank_momentum_ramp = env_int("BANK_MOMENTUM_RAMP", 1500)
    ns_steps = env_int("NS_STEPS", 5)
    embed_lr = env_float("EMBED_LR", 0.035)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    adam_wd = env_float("ADAM_WD", 0.02)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    grad_clip = env_float("GRAD_CLIP", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.997)
    qat_below = env_float("QAT_BELOW_LR", 0.15)

    # quantisation
    matrix_levels = env_int("MATRIX_LEVELS", 31)
    calib_batches = env_int("CALIB_BATCHES", 8)
    calib_rows = env_int("CALIB_ROWS", 16)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    size_limit = env_int("SIZE_LIMIT", 16_000_000)
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.lzma")

    # evaluation
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_rows = env_int("EVAL_ROWS", 32)
    eval_cap_s = env_float("EVAL_CAP_SECONDS", 600.0)
    eval_margin_s = env_float("EVAL_MARGIN_SECONDS", 120.0)
    ttt_enabled = env_bool("TTT_ENABLED", True)
    ttt_chunk = env_int("TTT_CHUNK", 32768)
    ttt_epochs = env_int("TTT_EPOCHS", 3)
    ttt_lr = env_float("TTT_LR", 0.004)
    ttt_momentum = env_float("TTT_MOMENTUM", 0.9)
    ttt_rows = env_int("TTT_ROWS", 2)
    ttt_clip = env_float("TTT_CLIP", 1.0)
    ttt_freeze = env_int("TTT_FREEZE", 0)


def settings_lines(args: type[Settings]) -> list[str]:
    """All settings as they stand, for the log."""
    lines = []
    for name in sorted(vars(args)):
        value = getattr(args, name)
        if name.startswith("_") or callable(value):
            continue
        lines.append(f"  {name} = {value!r}")
    return lines


# -----------------------------
# shards
# -----------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


def read_shard(path: str | Path) -> Tensor:
    """One .bin file: 256 int32 of header, then uint16 tokens."""
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"not a token shard: {path}")
    count = int(header[2])
    expected = HEADER_INTS * 4 + count * 2
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, header says {expected}")
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    if tokens.size != count:
        raise ValueError(f"short read of {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def read_split(pattern: str) -> Tensor:
    """All tokens of a split, shard after shard, nothing cut off."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return torch.cat([read_shard(f) for f in files]).contiguous()


class TokenTape:
    """The train shards as an endless tape."""

    def __init__(self, pattern: str):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"no shards match {pattern}")
        self.which = 0
        self.at = 0
        self.shard = read_shard(self.files[0])

    def turn(self) -> None:
        self.which = (self.which + 1) % len(self.files)
        self.shard = read_shard(self.files[self.which])
        self.at = 0

    def take(self, n: int) -> Tensor:
        pieces: list[Tensor] = []
        while n > 0:
            left = self.shard.numel() - self.at
            if left <= 0:
                self.turn()
                continue
            k = min(n, left)
            pieces.append(self.shard[self.at : self.at + k])
            self.at += k
            n -= k
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class RankFeed:
    """Cuts each global batch of the tape into one span per rank."""

    def __init__(self, pattern: str, rank: int, world: int, device: torch.device):
        self.rank = rank
        self.world = world
        self.device = device
        self.tape = TokenTape(pattern)

    def batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        mine = global_tokens // (self.world * accum)
        span = mine + 1
        block = self.tape.take(span * self.world)
        lo = self.rank * span
        local = block[lo : lo + span].to(torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# -----------------------------
# bytes of a token
# -----------------------------


def byte_tables(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """
    For each token id: bytes of its text without a leading space, whether it has one, whether it starts a text
    (so that the space after it is not written).
    """
    size = max(int(sp.vocab_size()), vocab_size)
    plain = np.zeros(size, dtype=np.int16)
    spaced = np.zeros(size, dtype=np.bool_)
    opener = np.ones(size, dtype=np.bool_)
    for tid in range(int(sp.vocab_size())):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            continue
        opener[tid] = False
        if sp.is_byte(tid):
            plain[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        if piece.startswith("\u2581"):
            spaced[tid] = True
            piece = piece[1:]
        plain[tid] = len(piece.encode("utf-8"))
    return (
        torch.tensor(plain, dtype=torch.int16, device=device),
        torch.tensor(spaced, dtype=torch.bool, device=device),
        torch.tensor(opener, dtype=torch.bool, device=device),
    )


def count_bytes(tables: tuple[Tensor, Tensor, Tensor], prev: Tensor, cur: Tensor) -> Tensor:
    """Bytes of each token of `cur`, given the token before it. float64."""
    plain, spaced, opener = tables
    n = plain[cur].to(torch.float64)
    n = n + (spaced[cur] & ~opener[prev]).to(torch.float64)
    return n


def figures(tally: Tensor) -> tuple[float, float]:
    """tally: [nats, tokens, bytes] -> (val_loss, val_bpb)."""
    nats, tokens, nbytes = (float(v) for v in tally.tolist())
    return nats / tokens, nats / math.log(2.0) / nbytes


# -----------------------------
# model
# -----------------------------

CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weight",
    "smear_gate",
    "bigram_scale",
    "value_scale",
)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rope(nn.Module):
    """Rotates the first `dims` of each head; tables are kept for the longest length seen."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inv = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv, persistent=False)
        self._len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._len != length or self._cos.device != device:
            t = torch.arange(length, device=device, dtype=torch.float32)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, :, None, :]
            self._sin = freqs.sin()[None, :, None, :]
            self._len = length
        return self._cos.to(dtype), self._sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    head, rest = x[..., :dims], x[..., dims:]
    a, b = head[..., : dims // 2], head[..., dims // 2 :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, heads, dim), causal, grouped keys."""
    if HAVE_FA3:
        out = _fa3(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.size(2) != k.size(2)
    )
    return o.transpose(1, 2)


class Smear(nn.Module):
    """Mixes the embedding of the token before into each position, not over the start of a document."""

    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.bos_id = bos_id
        self.smear_gate = nn.Parameter(torch.full((dim,), -2.0))

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear_gate).to(x.dtype)
        back = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        keep = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return x + g * keep * (back - x)


class PairHash(nn.Module):
    """An embedding of the hashed pair (token before, token), bucket 0 at the start of a document."""

    def __init__(self, buckets: int, dim: int, model_dim: int, bos_id: int):
        super().__init__()
        self.buckets = buckets
        self.bos_id = bos_id
        self.table = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.table.weight)
        self.lift = nn.Parameter(torch.zeros(model_dim, dim))
        nn.init.normal_(self.lift, std=0.02)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))

    def slots(self, ids: Tensor) -> Tensor:
        t = ids.to(torch.int32)
        prev = torch.cat((torch.zeros_like(t[:, :1]), t[:, :-1]), dim=1)
        h = torch.bitwise_xor(36313 * t, 27191 * prev) % (self.buckets - 1) + 1
        h = torch.where(t == self.bos_id, torch.zeros_like(h), h)
        h[:, 0] = 0
        return h.long()

    def forward(self, ids: Tensor) -> Tensor:
        e = self.table(self.slots(ids))
        return torch.einsum("bte,de->btd", e, self.lift.to(e.dtype)) * self.bigram_scale.to(e.dtype)


class ValueLift(nn.Module):
    """A narrow embedding of each token, lifted to the width of the values and added to them in a few layers."""

    def __init__(self, vocab_size: int, dim: int, kv_width: int, layers: tuple[int, ...]):
        super().__init__()
        self.layers = layers
        self.table = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.lift = nn.Parameter(torch.empty(kv_width, dim))
        nn.init.normal_(self.lift, std=0.02)
        self.value_scale = nn.Parameter(torch.full((max(len(layers), 1),), 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        e = self.table(ids)
        return torch.einsum("bte,ke->btk", e, self.lift.to(e.dtype))

    def share(self, i: int, lifted: Tensor) -> Tensor | None:
        if i not in self.layers:
            return None
        return lifted * self.value_scale[self.layers.index(i)].to(lifted.dtype)


def fake_levels(W: Tensor, levels: int) -> Tensor:
    """W as it will stand after rounding to int6, without the error correction."""
    s = (W.detach().abs().amax(dim=-1, keepdim=True) / levels).clamp_min(1e-8)
    return torch.clamp(torch.round(W.detach() / s), -levels, levels) * s


class LayerKnobs(nn.Module):
    """The small parameters of one layer; its matrices lie in the banks."""

    def __init__(self, args: type[Settings], index: int):
        super().__init__()
        d = args.model_dim
        self.attn_scale = nn.Parameter(torch.ones(d))
        self.mlp_scale = nn.Parameter(torch.ones(d))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(d), torch.zeros(d))))
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain))
        self.depth_scale = 1.0 / math.sqrt(index + 1)
        self.xsa = index >= args.num_layers - args.xsa_last


class BankedGPT(nn.Module):
    """
    bank_qo   (2L, D, D)   slices 0..L-1 queries, L..2L-1 output projections
    bank_kv   (2L, K, D)   slices 0..L-1 keys, L..2L-1 values
    bank_up   (L, H, D)
    bank_down (L, D, H)
    """

    def __init__(self, args: type[Settings], bos_id: int):
        super().__init__()
        L, D, H = args.num_layers, args.model_dim, args.mlp_hidden
        self.L, self.D = L, D
        self.heads, self.kv_heads = args.num_heads, args.num_kv_heads
        self.head_dim = D // args.num_heads
        K = self.kv_heads * self.head_dim
        self.softcap = args.softcap
        self.rope_dims = args.rope_dims
        self.embed = nn.Embedding(args.vocab_size, D)
        self.pairs = PairHash(args.bigram_buckets, args.bigram_dim, D, bos_id)
        self.smear = Smear(D, bos_id)
        self.values = ValueLift(args.vocab_size, args.value_dim, K, args.value_layers)
        self.levels = args.matrix_levels
        self.register_buffer("qat_mix", torch.zeros(()), persistent=False)
        self.bank_qo = nn.Parameter(torch.empty(2 * L, D, D))
        self.bank_kv = nn.Parameter(torch.empty(2 * L, K, D))
        self.bank_up = nn.Parameter(torch.empty(L, H, D))
        self.bank_down = nn.Parameter(torch.empty(L, D, H))
        self.knobs = nn.ModuleList([LayerKnobs(args, i) for i in range(L)])
        self.enc = L // 2
        self.dec = L - self.enc
        self.skip_weight = nn.Parameter(torch.ones(min(self.enc, self.dec), D))
        self.rope = Rope(args.rope_dims, args.rope_base)
        self.taps: dict[str, Tensor] | None = None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.005)
        for i in range(self.L):
            nn.init.orthogonal_(self.bank_qo.data[i])
            nn.init.zeros_(self.bank_qo.data[self.L + i])
            nn.init.orthogonal_(self.bank_kv.data[i])
            nn.init.orthogonal_(self.bank_kv.data[self.L + i])
            nn.init.orthogonal_(self.bank_up.data[i])
            nn.init.zeros_(self.bank_down.data[i])

    def banks(self) -> list[tuple[str, nn.Parameter]]:
        names = ("bank_qo", "bank_kv", "bank_up", "bank_down")
        return [(n, getattr(self, n)) for n in names]

    def open_taps(self, device: torch.device) -> None:
        H = self.bank_up.size(1)
        widths = {"attn_in": self.D, "attn_out": self.D, "up_in": self.D, "down_in": H}
        self.taps = {n: torch.zeros(self.L, w, w, dtype=torch.float32, device=device) for n, w in widths.items()}

    def rounded(self, bank: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """The bank in the dtype of the matmuls; late in training with its rounding error added, straight through."""
        if self.training:
            bank = bank + self.qat_mix * (fake_levels(bank, self.levels) - bank.detach())
        return bank.to(dtype)

    def tap(self, name: str, i: int, x: Tensor) -> None:
        if self.taps is not None:
            flat = x.detach().reshape(-1, x.size(-1)).float()
            self.taps[name][i].addmm_(flat.T, flat)

    def attention(self, i: int, x: Tensor, qo: Tensor, kv: Tensor, lifted: Tensor) -> Tensor:
        B, T, _ = x.shape
        knob = self.knobs[i]
        self.tap("attn_in", i, x)
        q = torch.einsum("btd,od->bto", x, qo[i]).reshape(B, T, self.heads, self.head_dim)
        k = torch.einsum("btd,od->bto", x, kv[i]).reshape(B, T, self.kv_heads, self.head_dim)
        v = torch.einsum("btd,od->bto", x, kv[self.L + i])
        extra = self.values.share(i, lifted)
        if extra is not None:
            v = v + extra
        v = v.reshape(B, T, self.kv_heads, self.head_dim)
        q, k = rms(q), rms(k)
        cos, sin = self.rope.tables(T, x.device, q.dtype)
        q, k = rotate(q, cos, sin, self.rope_dims), rotate(k, cos, sin, self.rope_dims)
        q = q * knob.q_gain.to(q.dtype)[None, None, :, None]
        y = attend(q, k, v)
        if knob.xsa:
            group = self.heads // self.kv_heads
            yg = y.reshape(B, T, self.kv_heads, group, self.head_dim)
            vn = F.normalize(v, dim=-1).unsqueeze(3)
            y = (yg - (yg * vn).sum(-1, keepdim=True) * vn).reshape(B, T, self.heads, self.head_dim)
        y = y.reshape(B, T, self.D)
        self.tap("attn_out", i, y)
        return torch.einsum("btd,od->bto", y, qo[self.L + i])

    def mlp(self, i: int, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        self.tap("up_in", i, x)
        h = F.leaky_relu(torch.einsum("btd,hd->bth", x, up[i]), negative_slope=0.5).square()
        self.tap("down_in", i, h)
        return torch.einsum("bth,dh->btd", h, down[i])

    def layer(self, i: int, x: Tensor, x0: Tensor, w: tuple[Tensor, ...], lifted: Tensor) -> Tensor:
        qo, kv, up, down = w
        knob = self.knobs[i]
        mix = knob.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + knob.attn_scale.to(x.dtype) * self.attention(i, rms(x) * knob.depth_scale, qo, kv, lifted)
        x = x + knob.mlp_scale.to(x.dtype) * self.mlp(i, rms(x) * knob.depth_scale, up, down)
        return x

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.pairs(ids).to(x.dtype)
        x = self.smear(ids, rms(x))
        x0 = x
        dt = torch.bfloat16 if x.is_cuda else x.dtype
        w = tuple(self.rounded(bank, dt) for _, bank in self.banks())
        lifted = self.values(ids).to(dt)
        kept: list[Tensor] = []
        for i in range(self.enc):
            x = self.layer(i, x, x0, w, lifted)
            kept.append(x)
        for j in range(self.dec):
            if kept:
                x = x + self.skip_weight[j].to(x.dtype) * kept.pop()
            x = self.layer(self.enc + j, x, x0, w, lifted)
        return rms(x)

    def head(self, h: Tensor) -> Tensor:
        raw = torch.einsum("btd,vd->btv", h, self.embed.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw.float() / self.softcap)

    def token_nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """-ln p of each target, (B, T), float32."""
        logits = self.head(self.hidden(ids))
        flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="none")
        return flat.reshape(targets.shape)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


# -----------------------------
# optimisers
# -----------------------------


@torch.compile
def newton_schulz(G: Tensor, steps: int) -> Tensor:
    """Quintic iteration on a batch of matrices, bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X.mT if tall else X


class BankMuon:
    """
    Muon on banks, shared between the ranks: `launch` starts one reduce_scatter per bank (largest first), `finish`
    waits for each, orthogonalises the rank's own slices and starts the all_gather of the updates.
    """

    def __init__(self, banks: list[tuple[str, nn.Parameter]], args: type[Settings], rank: int, world: int):
        self.args, self.rank, self.world = args, rank, world
        self.lr = args.bank_lr
        self.momentum = args.bank_momentum_start
        self.slots: list[dict] = []
        for name, p in sorted(banks, key=lambda item: -item[1].numel()):
            rows = -(-p.size(0) // world)
            padded = rows * world
            opts = dict(device=p.device, dtype=torch.bfloat16)
            self.slots.append(
                dict(
                    name=name,
                    p=p,
                    rows=rows,
                    grad_all=torch.zeros(padded, *p.shape[1:], **opts),
                    grad_own=torch.zeros(rows, *p.shape[1:], **opts),
                    upd_all=torch.zeros(padded, *p.shape[1:], **opts),
                    buf=torch.zeros(rows, *p.shape[1:], device=p.device, dtype=torch.float32),
                    scale=max(1.0, p.size(1) / p.size(2)) ** 0.5,
                    work=None,
                )
            )

    def launch(self) -> None:
        for s in self.slots:
            n = s["p"].size(0)
            s["grad_all"][:n].copy_(s["p"].grad)
            if self.world > 1:
                s["work"] = dist.reduce_scatter_tensor(
                    s["grad_own"], s["grad_all"], op=dist.ReduceOp.AVG, async_op=True
                )
            else:
                s["grad_own"].copy_(s["grad_all"])

    @torch.no_grad()
    def finish(self) -> None:
        gathers: list[tuple[dict, object]] = []
        for s in self.slots:
            if s["work"] is not None:
                s["work"].wait()
                s["work"] = None
            g = s["grad_own"].float()
            s["buf"].mul_(self.momentum).add_(g)
            upd = newton_schulz(g.add(s["buf"], alpha=self.momentum), self.args.ns_steps)
            if self.world > 1:
                gathers.append((s, dist.all_gather_into_tensor(s["upd_all"], upd.contiguous(), async_op=True)))
            else:
                s["upd_all"].copy_(upd)
                gathers.append((s, None))
        for s, work in gathers:
            if work is not None:
                work.wait()
            p = s["p"]
            p.data.mul_(1.0 - self.lr * self.args.bank_wd)
            p.data.add_(s["upd_all"][: p.size(0)].to(p.dtype), alpha=-self.lr * s["scale"])

    def state_copy(self) -> list[Tensor]:
        return [s["buf"].clone() for s in self.slots]

    def state_back(self, saved: list[Tensor]) -> None:
        for s, b in zip(self.slots, saved, strict=True):
            s["buf"].copy_(b)


def sum_grads(params: list[nn.Parameter], world: int, average: bool) -> None:
    """One flat all_reduce over the gradients of the parameters that are not banks."""
    if world == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG if average else dist.ReduceOp.SUM)
    at = 0
    for p, g in zip(params, grads, strict=True):
        n = g.numel()
        p.grad = flat[at : at + n].reshape(g.shape).to(g.dtype)
        at += n


# -----------------------------
# averaging of the weights
# -----------------------------


class Shadow:
    """Exponential moving average of all parameters, fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [n for n, _ in model.named_parameters()]
        self.live = [p for _, p in model.named_parameters()]
        self.slow = [p.detach().float().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        d = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_mul_(self.slow, d)
        torch._foreach_add_(self.slow, [p.detach().float() for p in self.live], alpha=1.0 - d)

    @torch.no_grad()
    def store_into_model(self) -> None:
        for p, s in zip(self.live, self.slow, strict=True):
            p.data.copy_(s.to(p.dtype))


# -----------------------------
# quantisation
# -----------------------------


def row_scales(W: Tensor, levels: int) -> Tensor:
    """The clip per row, out of a few quantiles, with the least squared error of the weights."""
    best_err = torch.full((W.size(0),), float("inf"), device=W.device)
    best = torch.ones(W.size(0), device=W.device)
    mags = W.abs()
    for q in (0.999, 0.9995, 0.9999, 1.0):
        clip = torch.quantile(mags, q, dim=1) if q < 1.0 else mags.amax(dim=1)
        s = (clip / levels).clamp_min(1e-8)
        back = torch.clamp(torch.round(W / s[:, None]), -levels, levels) * s[:, None]
        err = (back - W).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best = torch.where(better, s, best)
    return best


def gptq_slice(W: Tensor, H: Tensor, levels: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """GPTQ with the columns in order of falling diagonal. Returns int8 levels and fp16 scales per row."""
    W = W.float().clone()
    H = H.float().clone()
    cols = W.size(1)
    dead = torch.diagonal(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(torch.diagonal(H), descending=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * torch.diagonal(H).mean())
    inv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inv, upper=True)
    s = row_scales(W, levels).half().float()
    Q = torch.zeros_like(W)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        part = W[:, lo:hi].clone()
        errs = torch.zeros_like(part)
        for j in range(hi - lo):
            col = part[:, j]
            q = torch.clamp(torch.round(col / s), -levels, levels)
            Q[:, lo + j] = q
            e = (col - q * s) / U[lo + j, lo + j]
            part[:, j:] -= e[:, None] * U[lo + j, lo + j : hi][None, :]
            errs[:, j] = e
        W[:, hi:] -= errs @ U[lo:hi, hi:]
    back = torch.empty_like(Q)
    back[:, order] = Q
    return back.to(torch.int8), s.half()


def plain_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    W = W.float()
    s = (W.abs().amax(dim=1) / 127.0).clamp_min(1e-8).half()
    return torch.clamp(torch.round(W / s.float()[:, None]), -127, 127).to(torch.int8), s


BANK_INPUT = {
    # bank -> for each half of its slices the tap with its inputs
    "bank_qo": ("attn_in", "attn_out"),
    "bank_kv": ("attn_in", "attn_in"),
    "bank_up": ("up_in",),
    "bank_down": ("down_in",),
}


def quantise_all(
    state: dict[str, Tensor], taps: dict[str, Tensor], args: type[Settings], rank: int, world: int
) -> dict[str, Tensor]:
    """All ranks share the slices of the banks; the result is complete on every rank."""
    packed: dict[str, Tensor] = {}
    for name, w in state.items():
        if name in BANK_INPUT:
            L = args.num_layers
            q = torch.zeros(w.shape, dtype=torch.int8, device=w.device)
            s = torch.zeros(w.shape[:2], dtype=torch.float16, device=w.device)
            for i in range(rank, w.size(0), world):
                H = taps[BANK_INPUT[name][i // L]][i % L]
                q[i], s[i] = gptq_slice(w[i], H, args.matrix_levels, args.gptq_block, args.gptq_damp)
            if world > 1:
                wide, scale = q.to(torch.int32), s.float()
                dist.all_reduce(wide)
                dist.all_reduce(scale)
                q, s = wide.to(torch.int8), scale.half()
            packed[name + "|q"], packed[name + "|s"] = q.cpu(), s.cpu()
        elif w.ndim == 2 and w.numel() > 65536:
            q, s = plain_int8(w)
            packed[name + "|q"], packed[name + "|s"] = q.cpu(), s.cpu()
        else:
            packed[name] = w.detach().to(torch.float16).cpu()
    return packed


def unquantise(packed: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, ref in like.items():
        if name in packed:
            out[name] = packed[name].to(ref.dtype).reshape(ref.shape)
        else:
            q, s = packed[name + "|q"], packed[name + "|s"]
            out[name] = (q.float() * s.float().unsqueeze(-1)).to(ref.dtype)
    return out


def thin_ones(packed: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Sets the +-1 levels of the rows with the smallest scales to 0: `share` of the rows of each bank."""
    out = dict(packed)
    for name in BANK_INPUT:
        q, s = packed[name + "|q"].clone(), packed[name + "|s"]
        flat = s.float().reshape(-1)
        k = int(share * flat.numel())
        if k == 0:
            continue
        edge = flat.kthvalue(k).values
        small = (s.float() <= edge).unsqueeze(-1)
        q[small & (q.abs() == 1)] = 0
        out[name + "|q"] = q
    return out


# -----------------------------
# the artifact
# -----------------------------

DTYPES = {"int8": np.int8, "float16": np.float16}


def to_blob(packed: dict[str, Tensor], preset: int = 9) -> bytes:
    """A JSON index, then the bodies; int8 bodies first, column by column, which suits lzma. All under lzma."""
    index: list[list] = []
    body = io.BytesIO()
    for name in sorted(packed, key=lambda n: (packed[n].dtype != torch.int8, n)):
        a = packed[name].contiguous().numpy()
        index.append([name, str(a.dtype), list(a.shape)])
        body.write(np.ascontiguousarray(np.swapaxes(a, -1, -2) if a.ndim >= 2 else a).tobytes())
    head = json.dumps(index, separators=(",", ":")).encode("utf-8")
    raw = struct.pack("<I", len(head)) + head + body.getvalue()
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=preset | lzma.PRESET_EXTREME)


def from_blob(blob: bytes) -> dict[str, Tensor]:
    raw = lzma.decompress(blob)
    (n,) = struct.unpack_from("<I", raw, 0)
    index = json.loads(raw[4 : 4 + n].decode("utf-8"))
    at = 4 + n
    out: dict[str, Tensor] = {}
    for name, kind, shape in index:
        dtype = np.dtype(DTYPES[kind])
        count = int(np.prod(shape)) if shape else 1
        a = np.frombuffer(raw, dtype=dtype, count=count, offset=at)
        at += count * dtype.itemsize
        if len(shape) >= 2:
            turned = [*shape[:-2], shape[-1], shape[-2]]
            a = np.swapaxes(a.reshape(turned), -1, -2)
        else:
            a = a.reshape(shape)
        out[name] = torch.from_numpy(np.ascontiguousarray(a).copy())
    return out


def size_lines(packed: dict[str, Tensor]) -> list[str]:
    """How many bytes each tensor takes before lzma, largest first."""
    sizes = {n: t.numel() * t.element_size() for n, t in packed.items()}
    whole = sum(sizes.values())
    lines = [f"  {n:<24} {b:>10} bytes {100.0 * b / whole:5.1f}%" for n, b in sorted(sizes.items(), key=lambda i: -i[1])]
    return [*lines[:12], f"  before lzma: {whole} bytes in {len(sizes)} tensors"]


def fit_blob(packed: dict[str, Tensor], room: int) -> tuple[bytes, float]:
    """The artifact, thinned as little as is needed to fit into `room` bytes."""
    blob = to_blob(packed)
    if len(blob) <= room:
        return blob, 0.0
    lo, hi = 0.0, 1.0
    best = to_blob(thin_ones(packed, 1.0))
    for _ in range(5):
        mid = 0.5 * (lo + hi)
        trial = to_blob(thin_ones(packed, mid))
        if len(trial) <= room:
            hi, best = mid, trial
        else:
            lo = mid
    return best, hi


# -----------------------------
# windows
# -----------------------------


def plan_windows(total: int, seq_len: int, stride: int, chunk: int) -> list[list[tuple[int, int, int]]]:
    """
    Position p reads token p and predicts token p + 1; there are `total` of them. A window (start, first, end) reads
    [start, end) and scores [first, end); the scored parts tile [0, total). Each window belongs to the chunk in which
    its first scored position lies.
    """
    context = seq_len - stride
    plan: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-total // chunk))]
    for start in range(0, total, stride):
        if start and start + context >= total:
            break
        first = 0 if start == 0 else start + context
        end = min(start + seq_len, total)
        plan[first // chunk].append((start, first, end))
    return plan


def block_score(
    args: type[Settings],
    nll_fn,
    tokens: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    rank: int,
    world: int,
    device: torch.device,
) -> tuple[float, float]:
    """Blocks without overlap, for the log during training and after the round trip."""
    total = tokens.numel() - 1
    T = args.train_seq_len
    starts = list(range(0, total, T))[rank::world]
    tally = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for lo in range(0, len(starts), args.eval_rows):
            group = starts[lo : lo + args.eval_rows]
            xb = torch.zeros(args.eval_rows, T, dtype=torch.int64)
            yb = torch.zeros(args.eval_rows, T, dtype=torch.int64)
            live = torch.zeros(args.eval_rows, T, dtype=torch.bool)
            for r, s in enumerate(group):
                n = min(T, total - s)
                span = tokens[s : s + n + 1].to(torch.int64)
                xb[r, :n], yb[r, :n], live[r, :n] = span[:-1], span[1:], True
            xb, yb, live = xb.to(device), yb.to(device), live.to(device)
            nll = nll_fn(xb, yb)
            tally[0] += nll[live].double().sum()
            tally[1] += live.sum()
            tally[2] += count_bytes(tables, xb[live], yb[live]).sum()
    if world > 1:
        dist.all_reduce(tally)
    return figures(tally)


# -----------------------------
# the run
# -----------------------------


def main() -> None:
    args = Settings
    code = Path(__file__).read_text(encoding="utf-8")

    # ---- ranks
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world != 0:
        raise ValueError(f"WORLD_SIZE={world} must divide 8")
    accum = 8 // world
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    logfile = Path("logs") / f"{args.run_id}.txt"
    if master:
        logfile.parent.mkdir(exist_ok=True)

    def log(line: str, screen: bool = True) -> None:
        if not master:
            return
        if screen:
            print(line, flush=True)
        with logfile.open("a", encoding="utf-8") as f:
            print(line, file=f)

    log(code, screen=False)
    log(f"python {sys.version.split()[0]} torch {torch.__version__} fa3:{HAVE_FA3}", screen=False)
    for line in settings_lines(args):
        log(line, screen=False)
    log(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout, screen=False)

    # ---- tokenizer, validation tokens
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size}, tokenizer has {int(sp.vocab_size())}")
    bos_id = int(sp.bos_id())
    tables = byte_tables(sp, args.vocab_size, device)
    val_tokens = read_split(args.val_files)
    log(f"val tokens:{val_tokens.numel()} train shards:{len(glob.glob(args.train_files))}")

    # ---- model
    model = BankedGPT(args, bos_id).to(device)
    for p in model.parameters():
        p.data = p.data.float()
    net = torch.compile(model, dynamic=False, fullgraph=False)
    nll_fn = torch.compile(model.token_nll, dynamic=False, fullgraph=False)
    bank_params = [p for _, p in model.banks()]
    bank_ids = {id(p) for p in bank_params}
    rest = [p for p in model.parameters() if id(p) not in bank_ids]
    tables_of_model = [model.embed.weight, model.pairs.table.weight, model.values.table.weight]
    table_ids = {id(p) for p in tables_of_model}
    small = [p for p in rest if id(p) not in table_ids]
    log(f"params:{sum(p.numel() for p in model.parameters())} banks:{sum(p.numel() for p in bank_params)}")

    # ---- optimisers
    muon = BankMuon(model.banks(), args, rank, world)
    adam = torch.optim.AdamW(
        [
            dict(params=tables_of_model, lr=args.embed_lr, base_lr=args.embed_lr, weight_decay=args.adam_wd),
            dict(params=small, lr=args.scalar_lr, base_lr=args.scalar_lr, weight_decay=0.0),
        ],
        betas=(args.beta1, args.beta2),
        eps=1e-8,
        fused=True,
    )
    feed = RankFeed(args.train_files, rank, world, device)

    def one_step() -> Tensor:
        """Gradients of one global batch, then both optimisers. Returns this rank's mean loss."""
        total = torch.zeros((), device=device)
        for _ in range(accum):
            x, y = feed.batch(args.train_batch_tokens, args.train_seq_len, accum)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = net(x, y)
            (loss / accum).backward()
            total += loss.detach() / accum
        muon.launch()
        sum_grads(rest, world, average=True)
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(rest, args.grad_clip)
        adam.step()
        muon.finish()
        model.zero_grad(set_to_none=True)
        return total

    # ---- warm-up: compiles, then everything is put back
    if args.warmup_steps > 0:
        kept_model = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
        kept_adam = copy.deepcopy(adam.state_dict())
        kept_muon = muon.state_copy()
        model.train()
        for w in range(args.warmup_steps):
            one_step()
            if w + 1 == args.warmup_steps or (w + 1) % 10 == 0:
                log(f"warmup {w + 1}/{args.warmup_steps}")
        model.load_state_dict(kept_model)
        adam.load_state_dict(kept_adam)
        muon.state_back(kept_muon)
        model.zero_grad(set_to_none=True)
        feed = RankFeed(args.train_files, rank, world, device)
        del kept_model, kept_adam, kept_muon
    shadow = Shadow(model, args.ema_decay)

    # ---- training
    train_budget_ms = 1000.0 * (args.max_wallclock_s - args.calib_reserve_s)
    spent_ms = 0.0
    last_step = None
    step = 0
    torch.cuda.synchronize()
    if distributed:
        dist.barrier()
    mark = time.perf_counter()
    while True:
        ending = step == args.iterations or (last_step is not None and step >= last_step)
        if ending or (args.val_every > 0 and step % args.val_every == 0):
            torch.cuda.synchronize()
            spent_ms += 1000.0 * (time.perf_counter() - mark)
            model.eval()
            v_loss, v_bpb = block_score(args, nll_fn, val_tokens, tables, rank, world, device)
            model.train()
            log(f"step:{step}/{args.iterations} val_loss:{v_loss:.4f} val_bpb:{v_bpb:.4f} train_time:{spent_ms:.0f}ms")
            torch.cuda.synchronize()
            mark = time.perf_counter()
        if ending:
            break
        elapsed_ms = spent_ms + 1000.0 * (time.perf_counter() - mark)
        frac = min(max(elapsed_ms / train_budget_ms, step / args.iterations), 1.0)
        lr_scale = 1.0 if frac < 1.0 - args.warmdown_frac else (1.0 - frac) / args.warmdown_frac
        for group in adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        muon.lr = args.bank_lr * lr_scale
        ramp = min(step / max(args.bank_momentum_ramp, 1), 1.0)
        muon.momentum = (1.0 - ramp) * args.bank_momentum_start + ramp * args.bank_momentum
        if lr_scale < args.qat_below and step > 1000:
            model.qat_mix.fill_(1.0)
        train_loss = one_step()
        shadow.update(step)
        step += 1
        elapsed_ms = spent_ms + 1000.0 * (time.perf_counter() - mark)
        if step % args.log_every == 0 or step <= 5:
            log(f"step:{step} train_loss:{train_loss.item():.4f} train_time:{elapsed_ms:.0f}ms")
        over = torch.tensor(float(elapsed_ms >= train_budget_ms), device=device)
        if distributed:
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if last_step is None and over.item() > 0:
            last_step = step
            log(f"stopping: train_time:{elapsed_ms:.0f}ms of {train_budget_ms:.0f}ms step:{step}")
    torch.cuda.synchronize()
    log(f"peak memory {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- averaged weights; Hessians from train shards, still inside the 600 s
    calib_mark = time.perf_counter()
    shadow.store_into_model()
    model.qat_mix.zero_()
    model.eval()
    model.open_taps(device)
    with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        for c in range(args.calib_batches):
            if spent_ms + 1000.0 * (time.perf_counter() - calib_mark) > 1000.0 * args.max_wallclock_s - 2000.0:
                break
            cx, _ = feed.batch(args.calib_rows * args.train_seq_len * world, args.train_seq_len, 1)
            model.hidden(cx)
            torch.cuda.synchronize()
    taps = model.taps
    model.taps = None
    for name in taps:
        if distributed:
            dist.all_reduce(taps[name])
    torch.cuda.synchronize()
    spent_ms += 1000.0 * (time.perf_counter() - calib_mark)
    log(f"train+calibration: {spent_ms:.0f}ms, limit {1000.0 * args.max_wallclock_s:.0f}ms")

    # ---- quantise, pack, write
    state = {n: p.detach() for n, p in model.named_parameters()}
    packed = quantise_all(state, taps, args, rank, world)
    code_bytes = len(code.encode("utf-8"))
    if master:
        blob, thinned = fit_blob(packed, args.size_limit - code_bytes)
        Path(args.artifact_path).write_bytes(blob)
        log(f"artifact int6+lzma: {len(blob)} bytes, rows thinned: {thinned:.3f}")
        for line in size_lines(packed):
            log(line)
        log(f"code: {code_bytes} bytes")
        log(f"total: {len(blob) + code_bytes} bytes, limit {args.size_limit}")
        if len(blob) + code_bytes > args.size_limit:
            raise ValueError("artifact and code are over the limit")
    del taps, packed, shadow
    if distributed:
        dist.barrier()

    # ---- round trip: from here on only the artifact and the validation tokens are read
    eval_mark = time.perf_counter()
    loaded = from_blob(Path(args.artifact_path).read_bytes())
    model.load_state_dict(unquantise(loaded, state), strict=False)
    model.eval()
    r_loss, r_bpb = block_score(args, nll_fn, val_tokens, tables, rank, world, device)
    log(f"roundtrip val_loss:{r_loss:.4f} val_bpb:{r_bpb:.4f} eval_time:{time.perf_counter() - eval_mark:.1f}s")

    # ---- score-first test-time training: a chunk is scored, then trained on, then the next one
    T = args.eval_seq_len
    total = val_tokens.numel() - 1
    plan = plan_windows(total, T, args.eval_stride, args.ttt_chunk)
    tally = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes of this rank
    frozen = {f"knobs.{i}." for i in range(args.ttt_freeze)}
    adapted = [p for n, p in model.named_parameters() if not any(n.startswith(f) for f in frozen)]
    ttt_opt = torch.optim.SGD(adapted, lr=args.ttt_lr, momentum=args.ttt_momentum)
    adapting = args.ttt_enabled
    log(f"ttt: chunks:{len(plan)} windows:{sum(len(c) for c in plan)} positions:{total} adapting:{adapting}")
    for ci, windows in enumerate(plan):
        # score
        model.eval()
        mine = windows[rank::world]
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            for lo in range(0, len(mine), args.eval_rows):
                group = mine[lo : lo + args.eval_rows]
                xb = torch.zeros(args.eval_rows, T, dtype=torch.int64)
                yb = torch.zeros(args.eval_rows, T, dtype=torch.int64)
                live = torch.zeros(args.eval_rows, T, dtype=torch.bool)
                for r, (start, first, end) in enumerate(group):
                    span = val_tokens[start : end + 1].to(torch.int64)
                    xb[r, : end - start] = span[:-1]
                    yb[r, : end - start] = span[1:]
                    live[r, first - start : end - start] = True
                xb, yb, live = xb.to(device), yb.to(device), live.to(device)
                nll = nll_fn(xb, yb)
                tally[0] += nll[live].double().sum()
                tally[1] += live.sum()
                tally[2] += count_bytes(tables, xb[live], yb[live]).sum()
        if ci % 100 == 0 and master:
            so_far = figures(tally)
            log(f"ttt chunk:{ci}/{len(plan)} rank0_bpb:{so_far[1]:.4f} time:{time.perf_counter() - eval_mark:.1f}s")
        # train on what was just scored; never after the last chunk, nor when the time is nearly up
        clock = time.perf_counter() - eval_mark
        late = torch.tensor(float(clock > args.eval_cap_s - args.eval_margin_s), device=device)
        if distributed:
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late.item() > 0:
            adapting = False
        if not adapting or ci + 1 == len(plan):
            continue
        chunk_lo = ci * args.ttt_chunk
        rows_in_chunk = min(args.ttt_chunk, total - chunk_lo) // T
        lr_now = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(len(plan) - 1, 1)))
        for group_ in ttt_opt.param_groups:
            group_["lr"] = lr_now
        model.train()
        per_step = args.ttt_rows * world
        for _ in range(args.ttt_epochs):
            for base in range(0, rows_in_chunk, per_step):
                here = min(per_step, rows_in_chunk - base)
                own = [base + r for r in range(here) if r % world == rank]
                ttt_opt.zero_grad(set_to_none=True)
                if own:
                    spans = [val_tokens[chunk_lo + r * T : chunk_lo + (r + 1) * T + 1].to(torch.int64) for r in own]
                    both = torch.stack(spans).to(device)
                    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                        t_loss = net(both[:, :-1], both[:, 1:])
                    (t_loss * len(own) / here).backward()
                sum_grads(adapted, world, average=False)
                torch.nn.utils.clip_grad_norm_(adapted, args.ttt_clip)
                ttt_opt.step()
    if distributed:
        dist.all_reduce(tally)
    if int(tally[1].item()) != total:
        raise ValueError(f"scored {int(tally[1].item())} tokens of {total}")
    val_loss, val_bpb = figures(tally)
    log(f"scored tokens:{int(tally[1].item())} bytes:{int(tally[2].item())}")
    log(f"final eval_time:{time.perf_counter() - eval_mark:.1f}s limit:{args.eval_cap_s:.0f}s")
    log(f"final_ttt val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
    log(f"final_ttt_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
