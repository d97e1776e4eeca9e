#!/usr/bin/env python3
# 11L x 512, GQA 8/4, XSA, bigram hash, value embeddings, EMA, full GPTQ int6 + zstd-22, score-first TTT.
# Grown out of about forty runs. What did not help is still here behind its flag (see "graveyard" below);
# everything in the graveyard is OFF by default and OFF in the submitted runs.
import copy
import io
import itertools
import lzma
import math
import os
import random
import sys
import time
import uuid
import zlib
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import zstandard
except ImportError:
    zstandard = None
try:
    from flash_attn_interface import flash_attn_func as flash_attn_3_func

    HAVE_FA3 = True
except ImportError:
    flash_attn_3_func = None
    HAVE_FA3 = False


def word(name: str, default: str) -> str:
    return os.environ.get(name, default)


def whole(name: str, default: int) -> int:
    return int(word(name, str(default)))


def real(name: str, default: float) -> float:
    return float(word(name, str(default)))


def flag(name: str, default: int) -> bool:
    return whole(name, default) != 0


class Knobs:
    # where things are
    shard_dir = word("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_shards = shard_dir + "/fineweb_train_*.bin"
    split_shards = shard_dir + "/fineweb_val_*.bin"
    piece_model = word("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = word("RUN_ID", "") or str(uuid.uuid4())
    seed = whole("SEED", 1337)
    bos_id = whole("BOS_ID", 1)

    # run length
    val_batch_size = whole("VAL_BATCH_SIZE", 524_288)
    val_loss_every = whole("VAL_LOSS_EVERY", 4000)
    train_log_every = whole("TRAIN_LOG_EVERY", 500)
    iterations = whole("ITERATIONS", 20_000)
    warmdown_iters = whole("WARMDOWN_ITERS", 3500)
    warmup_steps = whole("WARMUP_STEPS", 20)
    train_batch_tokens = whole("TRAIN_BATCH_TOKENS", 786_432)
    train_seq_len = whole("TRAIN_SEQ_LEN", 2048)
    eval_seq_len = whole("EVAL_SEQ_LEN", 2048)
    max_wallclock_seconds = real("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = real("GPTQ_RESERVE_SECONDS", 14.0)

    # model
    vocab_size = whole("VOCAB_SIZE", 1024)
    num_layers = whole("NUM_LAYERS", 11)
    num_kv_heads = whole("NUM_KV_HEADS", 4)
    model_dim = whole("MODEL_DIM", 512)
    num_heads = whole("NUM_HEADS", 8)
    mlp_mult = real("MLP_MULT", 3.0)
    rope_base = real("ROPE_BASE", 10_000.0)
    rope_dims = whole("ROPE_DIMS", 16)
    ln_scale = flag("LN_SCALE", 1)
    logit_softcap = real("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = real("QK_GAIN_INIT", 1.5)
    xsa_last_n = whole("XSA_LAST_N", 11)
    bigram_vocab_size = whole("BIGRAM_VOCAB_SIZE", 2048)
    bigram_dim = whole("BIGRAM_DIM", 128)
    ve_enabled = flag("VE_ENABLED", 1)
    ve_dim = whole("VE_DIM", 128)
    ve_layers = word("VE_LAYERS", "9,10")
    smear_enabled = flag("SMEAR_ENABLED", 1)
    tied_embed_init_std = real("TIED_EMBED_INIT_STD", 0.005)
    value_residual = flag("VALUE_RESIDUAL", 0)
    gated_attention = flag("GATED_ATTENTION", 0)

    # optimiser
    tied_embed_lr = real("TIED_EMBED_LR", 0.035)
    matrix_lr = real("MATRIX_LR", 0.025)
    scalar_lr = real("SCALAR_LR", 0.025)
    muon_momentum = real("MUON_MOMENTUM", 0.99)
    muon_momentum_warmup_start = real("MUON_MOMENTUM_WARMUP_START", 0.92)
    muon_momentum_warmup_steps = whole("MUON_MOMENTUM_WARMUP_STEPS", 1500)
    muon_backend_steps = whole("MUON_BACKEND_STEPS", 5)
    muon_eq_r = flag("MUON_EQ_R", 0)
    muon_wd = real("MUON_WD", 0.04)
    adam_wd = real("ADAM_WD", 0.04)
    betas = (real("BETA1", 0.9), real("BETA2", 0.95))
    adam_eps = real("ADAM_EPS", 1e-8)
    grad_clip_norm = real("GRAD_CLIP_NORM", 0.3)

    # averaging
    ema_decay = real("EMA_DECAY", 0.997)
    swa_enabled = flag("SWA_ENABLED", 0)
    swa_every = whole("SWA_EVERY", 50)
    swa_start_scale = real("SWA_START_SCALE", 0.2)
    avg_select = word("AVG_SELECT", "ema")  # ema | swa | best | none

    # quantisation
    late_qat_threshold = real("LATE_QAT_THRESHOLD", 0.15)
    quant_bits = whole("QUANT_BITS", 6)
    mlp_bits = whole("MLP_BITS", 6)
    embed_bits = whole("EMBED_BITS", 8)
    gptq_enabled = flag("GPTQ_ENABLED", 1)
    gptq_calib_batches = whole("GPTQ_CALIB_BATCHES", 64)
    gptq_block = whole("GPTQ_BLOCK", 128)
    gptq_damp = real("GPTQ_DAMP", 0.01)
    calib_source = word("CALIB_SOURCE", "train")  # train | random | val
    prune_frac = real("PRUNE_FRAC", 0.0)
    compressor = word("COMPRESSOR", "zstd")  # zstd | lzma | zlib

    # evaluation
    eval_stride = whole("EVAL_STRIDE", 64)
    eval_batch_seqs = whole("EVAL_BATCH_SEQS", 32)
    eval_temperature = real("EVAL_TEMPERATURE", 1.0)
    ttt_enabled = flag("TTT_ENABLED", 1)
    ttt_lr = real("TTT_LR", 0.002)
    ttt_momentum = real("TTT_MOMENTUM", 0.9)
    ttt_epochs = whole("TTT_EPOCHS", 3)
    ttt_chunk_tokens = whole("TTT_CHUNK_TOKENS", 32_768)
    ttt_freeze_blocks = whole("TTT_FREEZE_BLOCKS", 0)
    ttt_batch_seqs = whole("TTT_BATCH_SEQS", 32)
    ttt_grad_clip = real("TTT_GRAD_CLIP", 1.0)

    # graveyard: tried, did not keep
    ttt_rescore = flag("TTT_RESCORE", 0)
    prequant_ttt_epochs = whole("PREQUANT_TTT_EPOCHS", 0)
    prequant_ttt_lr = real("PREQUANT_TTT_LR", 5e-4)
    slot_steps = whole("SLOT_STEPS", 0)
    slot_lr = real("SLOT_LR", 0.005)
    ngram_alpha = real("NGRAM_ALPHA", 0.0)
    ngram_order = whole("NGRAM_ORDER", 5)
    ngram_buckets = whole("NGRAM_BUCKETS", 4_194_304)
    temp_search = flag("TEMP_SEARCH", 0)
    max_val_tokens = whole("MAX_VAL_TOKENS", 0)  # 0 = the whole split
    mtp_weight = real("MTP_WEIGHT", 0.0)
    focal_gamma = real("FOCAL_GAMMA", 0.0)


# ---------------------------------------------------------------- Muon


def whiten(g: Tensor, steps: int = 5) -> Tensor:
    # bring all singular values near one: p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, five times over
    x = g.to(torch.bfloat16)
    if g.size(0) > g.size(1):
        return whiten(g.T, steps).T
    x = F.normalize(x.flatten(), dim=0, eps=1e-7).view_as(x)
    for _ in range(steps):
        s2 = x @ x.T
        x = 3.4445 * x + (2.0315 * s2 @ s2 - 4.7750 * s2) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Each rank whitens its slice of the matrices; the slices are summed into everybody's update."""

    def __init__(self, groups, **defaults):
        super().__init__(groups, {"nesterov": True, "weight_decay": 0.0, "row_norm": False, **defaults})

    def momentum_of(self, p: Tensor, g: dict) -> Tensor:
        state = self.state[p]
        if "m" not in state:
            state["m"] = p.grad.clone()
        else:
            state["m"].mul_(g["momentum"]).add_(p.grad)
        u = p.grad + g["momentum"] * state["m"] if g["nesterov"] else state["m"]
        return F.normalize(u, dim=1) if g["row_norm"] else u

    @torch.no_grad()
    def step(self, closure=None):
        pieces, me = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for g in self.param_groups:
            made = [torch.zeros_like(p, dtype=torch.bfloat16) for p in g["params"]]
            for p, u in list(zip(g["params"], made))[me::pieces]:
                if p.grad is not None:
                    u.copy_(whiten(self.momentum_of(p, g), g["backend_steps"]) * max(1.0, p.size(0) / p.size(1)) ** 0.5)
            if pieces > 1:
                joint = torch.nn.utils.parameters_to_vector(made)
                dist.all_reduce(joint)
                torch.nn.utils.vector_to_parameters(joint, made)
            for p, u in zip(g["params"], made):
                p.mul_(1.0 - g["lr"] * g["weight_decay"]).add_(u.to(p.dtype), alpha=-g["lr"])


# ---------------------------------------------------------------- bytes per token


def piece_sizes(sp, vocab_size: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Per id: bytes without the space mark, whether it has one, whether it is no text (then no space follows it)."""
    n = int(sp.vocab_size())
    assert n == vocab_size, f"VOCAB_SIZE={vocab_size}, tokenizer has {n}"
    own_bytes, opens_word, no_text = np.zeros(n, np.int16), np.zeros(n, bool), np.zeros(n, bool)
    for tid in range(n):
        if sp.is_control(tid) or sp.is_unknown(tid) or sp.is_unused(tid):
            no_text[tid] = True
            continue
        if sp.is_byte(tid):
            own_bytes[tid] = 1
            continue
        piece = sp.id_to_piece(tid)
        opens_word[tid] = piece.startswith("\u2581")
        own_bytes[tid] = len(piece.removeprefix("\u2581").encode("utf-8"))
    return tuple(torch.from_numpy(a).to(device) for a in (own_bytes, opens_word, no_text))


def count_bytes(prev_ids: Tensor, target_ids: Tensor, sizes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    own_bytes, opens_word, no_text = sizes
    n = own_bytes[target_ids].to(torch.float64)
    n += (opens_word[target_ids] & ~no_text[prev_ids]).to(torch.float64)
    return n.sum()


# ---------------------------------------------------------------- shards


def shards_of(pattern: str) -> list[Path]:
    found = sorted(Path(pattern).parent.glob(Path(pattern).name))
    assert found, f"no shards: {pattern}"
    return found


def read_shard(path: Path) -> Tensor:
    """1024 bytes of header (magic, version, number of tokens, zeros), then the tokens as little-endian uint16."""
    raw = path.read_bytes()
    magic, version, n = np.frombuffer(raw, "<i4", 3)
    assert (magic, version) == (20240520, 1), f"{path}: not a shard ({magic}, {version})"
    assert len(raw) == 1024 + 2 * n, f"{path}: {n} tokens announced, {(len(raw) - 1024) // 2} there"
    return torch.from_numpy(np.frombuffer(raw, "<u2", n, 1024).copy())


def read_split(hp: Knobs) -> Tensor:
    tokens = torch.cat([read_shard(path) for path in shards_of(hp.split_shards)])
    if hp.max_val_tokens > 0:  # quick looks on one GPU
        tokens = tokens[: hp.max_val_tokens + 1]
    whole_seqs = (tokens.numel() - 1) // hp.eval_seq_len
    assert whole_seqs, "validation split shorter than one sequence"
    return tokens[: whole_seqs * hp.eval_seq_len + 1]


class ShardWalk:
    """Tokens of the shards in order, round and round."""

    def __init__(self, pattern: str):
        self.todo = itertools.cycle(shards_of(pattern))
        self.rest = torch.empty(0, dtype=torch.uint16)

    def next(self, n: int) -> Tensor:
        while self.rest.numel() < n:
            self.rest = torch.cat((self.rest, read_shard(next(self.todo))))
        out, self.rest = self.rest[:n], self.rest[n:]
        return out


class RankFeed:
    """All ranks walk the same tokens; of each global batch a rank keeps the sequences that are its own."""

    def __init__(self, pattern: str, rank: int, world: int, device):
        self.walk = ShardWalk(pattern)
        self.rank, self.world, self.device = rank, world, device

    def rows(self, global_tokens: int, seq_len: int, micro_steps: int) -> tuple[Tensor, Tensor]:
        mine = global_tokens // (self.world * micro_steps)
        # one token more than is used, so that a rank's last input has its target
        part = self.walk.next((mine + 1) * self.world).view(self.world, mine + 1)[self.rank]
        part = part.to(torch.int64).pin_memory().to(self.device, non_blocking=True)
        return part[:-1].view(-1, seq_len), part[1:].view(-1, seq_len)


# ---------------------------------------------------------------- model

CONTROL = ("_gain", "root_mix", "smear", "_scale", "vr_lambda")


def unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Dense(nn.Linear):
    _qat_enabled = False
    _qat_top = 31

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if Dense._qat_enabled and self.training and w.ndim == 2:
            with torch.no_grad():
                s = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / Dense._qat_top
                wq = (w / s).round().clamp(-Dense._qat_top, Dense._qat_top) * s
            w = w + (wq - w).detach()
        y = F.linear(x, w.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Rotary(nn.Module):
    # tables made once: a cache filled under inference_mode could not be used by the TTT steps
    def __init__(self, head_dim: int, rope_dims: int, base: float, max_len: int):
        super().__init__()
        self.rope_dims = rope_dims if rope_dims > 0 else head_dim
        inv = 1.0 / base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv)
        self.register_buffer("cos", freqs.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", freqs.sin()[None, :, None, :], persistent=False)

    def forward(self, t: int, dtype) -> tuple[Tensor, Tensor]:
        return self.cos[:, :t].to(dtype), self.sin[:, :t].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    head, tail = x[..., :dims], x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, tail), dim=-1)


class Attention(nn.Module):
    def __init__(self, hp: Knobs, use_xsa: bool):
        super().__init__()
        self.h, self.g = hp.num_heads, hp.num_kv_heads
        self.d = hp.model_dim // hp.num_heads
        self.to_q = Dense(hp.model_dim, hp.model_dim, bias=False)
        self.to_k = Dense(hp.model_dim, self.g * self.d, bias=False)
        self.to_v = Dense(hp.model_dim, self.g * self.d, bias=False)
        self.proj = Dense(hp.model_dim, hp.model_dim, bias=False)
        self.proj.starts_at_zero = True
        self.q_gain = nn.Parameter(torch.full((self.h,), hp.qk_gain_init))
        self.rotary = Rotary(self.d, hp.rope_dims, hp.rope_base, max(hp.train_seq_len, hp.eval_seq_len))
        self.use_xsa = use_xsa
        self.gate = Dense(hp.model_dim, self.h, bias=True) if hp.gated_attention else None
        self.vr_lambda = nn.Parameter(torch.zeros(())) if hp.value_residual else None

    def forward(self, x: Tensor, ve: Tensor | None, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        b, t, dim = x.shape
        q = self.to_q(x).view(b, t, self.h, self.d)
        k = self.to_k(x).view(b, t, self.g, self.d)
        v = self.to_v(x)
        raw_v = v
        if ve is not None:
            v = v + ve
        if v0 is not None and self.vr_lambda is not None:
            v = v + torch.sigmoid(self.vr_lambda).to(v.dtype) * v0
        v = v.view(b, t, self.g, self.d)
        q, k = unit(q), unit(k)
        cos, sin = self.rotary(t, q.dtype)
        q, k = rotate(q, cos, sin, self.rotary.rope_dims), rotate(k, cos, sin, self.rotary.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if HAVE_FA3:
            y = flash_attn_3_func(q, k, v, causal=True)
            y = y[0] if isinstance(y, tuple) else y
        else:
            heads_first = [z.transpose(1, 2) for z in (q, k, v)]
            y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=self.h != self.g).transpose(1, 2)
        if self.use_xsa:
            y = self.exclude_self(y, v)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x)).unsqueeze(-1)
        return self.proj(y.reshape(b, t, dim)), raw_v

    def exclude_self(self, y: Tensor, v: Tensor) -> Tensor:
        # take out of each head's output what points along the position's own value
        b, t, h, d = y.shape
        yg = y.reshape(b, t, self.g, h // self.g, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (yg - (yg * vn).sum(-1, keepdim=True) * vn).reshape(b, t, h, d)


class Widen(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        self.fc = Dense(dim, int(dim * mult), bias=False)
        self.proj = Dense(int(dim * mult), dim, bias=False)
        self.proj.starts_at_zero = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Smear(nn.Module):
    # mixes in the previous token's embedding, never across a document's start
    def __init__(self, dim: int, bos_id: int):
        super().__init__()
        self.smear = nn.Parameter(torch.zeros(dim))
        self.bos_id = bos_id

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.smear.to(x.dtype))[None, None, :]
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (ids != self.bos_id).unsqueeze(-1).to(x.dtype)
        return (1 - g * inside) * x + g * inside * prev


class PairHash(nn.Module):
    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.proj = Dense(dim, model_dim, bias=False)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, token_ids: Tensor) -> Tensor:
        ids = token_ids.to(torch.int32)
        idx = torch.full_like(ids, self.buckets - 1)
        idx[:, 1:] = torch.bitwise_xor(50021 * ids[:, 1:], 31337 * ids[:, :-1]) % (self.buckets - 1)
        return self.proj(self.embed(idx.long())) * self.bigram_scale


class ValueEmbedding(nn.Module):
    def __init__(self, vocab: int, dim: int, kv_dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.proj = Dense(dim, kv_dim, bias=False)
        self.ve_scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.proj(self.embed(token_ids)) * self.ve_scale


class Stage(nn.Module):
    def __init__(self, hp: Knobs, layer: int):
        super().__init__()
        self.attn = Attention(hp, use_xsa=layer >= hp.num_layers - hp.xsa_last_n)
        self.mlp = Widen(hp.model_dim, hp.mlp_mult)
        self.attn_gain = nn.Parameter(torch.ones(hp.model_dim))
        self.mlp_gain = nn.Parameter(torch.ones(hp.model_dim))
        self.root_mix = nn.Parameter(torch.stack((torch.ones(hp.model_dim), torch.zeros(hp.model_dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1) if hp.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        mix = self.root_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, raw_v = self.attn(unit(x) * self.depth_scale, ve, v0)
        x = x + self.attn_gain.to(x.dtype) * y
        x = x + self.mlp_gain.to(x.dtype) * self.mlp(unit(x) * self.depth_scale)
        return x, raw_v


class Decoder(nn.Module):
    def __init__(self, hp: Knobs):
        super().__init__()
        self.softcap = hp.logit_softcap
        self.wte = nn.Embedding(hp.vocab_size, hp.model_dim)
        self.bigram = PairHash(hp.bigram_vocab_size, hp.bigram_dim, hp.model_dim)
        self.smear = Smear(hp.model_dim, hp.bos_id) if hp.smear_enabled else None
        self.n_enc = hp.num_layers // 2
        self.skip_gain = nn.Parameter(torch.ones(self.n_enc, hp.model_dim))
        self.blocks = nn.ModuleList([Stage(hp, i) for i in range(hp.num_layers)])
        self.ve_layers = [int(s) for s in hp.ve_layers.split(",") if s] if hp.ve_enabled else []
        kv_dim = hp.num_kv_heads * (hp.model_dim // hp.num_heads)
        self.ve = ValueEmbedding(hp.vocab_size, hp.ve_dim, kv_dim) if self.ve_layers else None
        self.ve_layer_scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in self.ve_layers])
        self.value_residual = hp.value_residual
        self.mtp_weight = hp.mtp_weight
        self.mtp_head = Dense(hp.model_dim, hp.vocab_size, bias=False) if hp.mtp_weight > 0 else None
        self.focal_gamma = hp.focal_gamma
        self.init_weights(hp)

    def init_weights(self, hp: Knobs) -> None:
        nn.init.normal_(self.wte.weight, std=hp.tied_embed_init_std)
        for name, m in self.named_modules():
            if not isinstance(m, nn.Linear):
                continue
            if getattr(m, "starts_at_zero", False):
                nn.init.zeros_(m.weight)
            elif min(m.weight.shape) >= 64:
                nn.init.orthogonal_(m.weight)
                if name.endswith("proj"):
                    m.weight.data.mul_(1.0 / math.sqrt(2 * hp.num_layers))

    def value_embedding(self, layer: int, ids: Tensor) -> Tensor | None:
        if self.ve is None or layer not in self.ve_layers:
            return None
        return self.ve(ids) * self.ve_layer_scales[self.ve_layers.index(layer)]

    def features(self, ids: Tensor) -> Tensor:
        x = unit(self.wte(ids) + self.bigram(ids))
        if self.smear is not None:
            x = self.smear(x, ids)
        x0, v0, down = x, None, []
        for i, stage in enumerate(self.blocks):
            if i >= self.n_enc and down:
                x = x + self.skip_gain[i - self.n_enc].to(x.dtype) * down.pop()
            x, raw_v = stage(x, x0, self.value_embedding(i, ids), v0)
            if self.value_residual and v0 is None:
                v0 = raw_v
            if i < self.n_enc:
                down.append(x)
        return unit(x)

    def project(self, h: Tensor) -> Tensor:
        return self.softcap * torch.tanh(F.linear(h, self.wte.weight.to(h.dtype)) / self.softcap)

    def logits_of(self, ids: Tensor) -> Tensor:
        return self.project(self.features(ids))

    def forward(self, ids: Tensor, goal: Tensor) -> Tensor:
        h = self.features(ids)
        logits = self.project(h).float()
        flat = goal.reshape(-1)
        if self.focal_gamma > 0 and self.training:
            ce = F.cross_entropy(logits.reshape(-1, logits.size(-1)), flat, reduction="none")
            loss = ((1 - torch.exp(-ce)) ** self.focal_gamma * ce).mean()
        else:
            loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), flat)
        if self.mtp_head is not None and self.training:
            ahead = self.mtp_head(h[:, :-1]).float()
            loss = loss + self.mtp_weight * F.cross_entropy(ahead.reshape(-1, ahead.size(-1)), goal[:, 1:].reshape(-1))
        return loss


# ---------------------------------------------------------------- evaluation


def no_sums(device) -> tuple[Tensor, Tensor, Tensor]:
    """Nats, targets and bytes, nothing booked yet."""
    return torch.zeros(3, dtype=torch.float64, device=device).unbind()


def pool(*sums: Tensor) -> None:
    for s in sums:
        if dist.is_initialized():
            dist.all_reduce(s)


def to_bpb(nats: Tensor, n_targets: Tensor, n_bytes: Tensor) -> tuple[float, float]:
    return (nats / n_targets).item(), (nats / n_bytes).item() / math.log(2.0)


def eval_blocks(hp, model, rank, world, device, micro_steps, split_ids, sizes) -> tuple[float, float]:
    seq = hp.eval_seq_len
    at_once = max(1, hp.val_batch_size // (world * micro_steps * seq))
    total = (split_ids.numel() - 1) // seq
    nats, n_targets, n_bytes = no_sums(device)
    model.eval()
    with torch.inference_mode():
        for mine in torch.arange(total)[total * rank // world : total * (rank + 1) // world].split(at_once):
            x, y = gather_windows(split_ids, (mine * seq).tolist(), seq, device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            nats += loss.to(torch.float64) * y.numel()
            n_targets += y.numel()
            n_bytes += count_bytes(x, y, sizes)
    pool(nats, n_targets, n_bytes)
    model.train()
    return to_bpb(nats, n_targets, n_bytes)


def window_starts(total: int, seq: int, stride: int) -> list[int]:
    # starts w with w + seq <= total; total is a multiple of seq and seq of stride, so the spans tile the split
    return list(range(0, total - seq + 1, stride))


def scored_from(ws: int, seq: int, stride: int) -> int:
    return 0 if ws == 0 else seq - stride


def gather_windows(split_ids: Tensor, starts: list[int], seq: int, device) -> tuple[Tensor, Tensor]:
    rows = torch.stack([split_ids[w : w + seq + 1] for w in starts]).to(device=device, dtype=torch.int64)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def eval_windows(
    hp, net, rank, world, device, split_ids, sizes, stride, temperature=1.0, mixer=None
) -> tuple[float, float]:
    seq = hp.eval_seq_len
    starts = window_starts(split_ids.numel() - 1, seq, stride)
    mine = starts[len(starts) * rank // world : len(starts) * (rank + 1) // world]
    nats, n_targets, n_bytes = no_sums(device)
    net.eval()
    logits_of = torch.compile(net.logits_of, dynamic=False)
    with torch.inference_mode():
        for bi in range(0, len(mine), hp.eval_batch_seqs):
            batch = mine[bi : bi + hp.eval_batch_seqs]
            x, y = gather_windows(split_ids, batch, seq, device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = logits_of(x)
            logits = logits.float() / temperature
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
            for row, ws in enumerate(batch):
                s = scored_from(ws, seq, stride)
                row_nll = nll[row, s:].to(torch.float64)
                if mixer is not None:
                    row_nll = mixer.blend(row_nll, x[row], y[row], s)
                nats += row_nll.sum()
                n_targets += seq - s
                n_bytes += count_bytes(x[row, s:], y[row, s:], sizes)
    pool(nats, n_targets, n_bytes)
    net.train()
    return to_bpb(nats, n_targets, n_bytes)


def ttt_parameters(net: Decoder, freeze_blocks: int) -> list[nn.Parameter]:
    frozen = tuple(f"blocks.{i}." for i in range(freeze_blocks))
    chosen = []
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
        if p.requires_grad:
            chosen.append(p)
    return chosen


def eval_adaptive(
    hp, net, rank, world, device, split_ids, sizes, stride, temperature=1.0, mixer=None, say=print
) -> tuple[float, float]:
    """Score-first test-time training.

    The split is cut into chunks. A chunk's windows are all scored (inference mode, weights fixed) and their losses are
    booked for good; only then do the weights take a few SGD epochs on that same chunk. Chunk c is therefore scored by
    weights that have seen chunks 0..c-1 only. The last chunk is scored and not trained on.
    """
    seq, chunk = hp.eval_seq_len, hp.ttt_chunk_tokens
    if chunk % seq or chunk % stride or seq % stride:
        raise ValueError("TTT_CHUNK_TOKENS must be a multiple of EVAL_SEQ_LEN and EVAL_STRIDE")
    total = split_ids.numel() - 1
    num_chunks = (total + chunk - 1) // chunk
    windows: list[list[int]] = [[] for _ in range(num_chunks)]
    for ws in window_starts(total, seq, stride):
        windows[(ws + scored_from(ws, seq, stride)) // chunk].append(ws)

    nats, n_targets, n_bytes = no_sums(device)
    params = ttt_parameters(net, hp.ttt_freeze_blocks)
    optimizer = torch.optim.SGD(params, lr=hp.ttt_lr, momentum=hp.ttt_momentum)
    say(f"ttt: chunks:{num_chunks} chunk_tokens:{chunk} params:{sum(p.numel() for p in params)} epochs:{hp.ttt_epochs}")

    for ci in range(num_chunks):
        # ---- score
        lo, hi = len(windows[ci]) * rank // world, len(windows[ci]) * (rank + 1) // world
        mine = windows[ci][lo:hi]
        net.eval()
        with torch.inference_mode():
            for bi in range(0, len(mine), hp.eval_batch_seqs):
                batch = mine[bi : bi + hp.eval_batch_seqs]
                x, y = gather_windows(split_ids, batch, seq, device)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    logits = net.logits_of(x)
                logits = logits.float() / temperature
                nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
                for row, ws in enumerate(batch):
                    s = scored_from(ws, seq, stride)
                    row_nll = nll[row, s:].to(torch.float64)
                    if mixer is not None:
                        row_nll = mixer.blend(row_nll, x[row], y[row], s)
                    nats += row_nll.sum()
                    n_targets += seq - s
                    n_bytes += count_bytes(x[row, s:], y[row, s:], sizes)

        # ---- then learn
        if ci == num_chunks - 1:
            continue
        ttt_train_chunk(hp, net, optimizer, params, rank, world, device, split_ids, ci, num_chunks)
        if ci % 100 == 0:
            running = (nats / n_targets.clamp_min(1)).item()
            say(f"ttt: chunk {ci + 1}/{num_chunks} running loss on rank 0 {running:.4f}")

    pool(nats, n_targets, n_bytes)
    for p in net.parameters():
        p.requires_grad_(True)
    return to_bpb(nats, n_targets, n_bytes)


def ttt_train_chunk(hp, net, optimizer, params, rank, world, device, split_ids, ci, num_chunks) -> None:
    seq, chunk = hp.eval_seq_len, hp.ttt_chunk_tokens
    start = ci * chunk
    seqs = chunk // seq
    lo, hi = seqs * rank // world, seqs * (rank + 1) // world
    lr = hp.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    net.train()
    for _ in range(hp.ttt_epochs):
        for b in range(lo, hi, hp.ttt_batch_seqs):
            e = min(b + hp.ttt_batch_seqs, hi)
            local = split_ids[start + b * seq : start + e * seq + 1].to(device=device, dtype=torch.int64)
            x, y = local[:-1].reshape(-1, seq), local[1:].reshape(-1, seq)
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = net(x, y)
            loss.backward()
            if world > 1:
                for p in params:
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, hp.ttt_grad_clip)
            optimizer.step()


# ---------------------------------------------------------------- graveyard


class HashedNgram:
    """Hashed n-gram blend (run 31). The ratio of two hashed counts is no distribution: NGRAM_ALPHA stays 0."""

    def __init__(self, order: int, buckets: int, alpha: float):
        self.order, self.buckets, self.alpha = order, buckets, alpha
        self.ctx = np.zeros(buckets, dtype=np.int64)
        self.full = np.zeros(buckets, dtype=np.int64)

    def keys(self, x: np.ndarray, y: np.ndarray, s: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(y) - s
        h = np.zeros(n, dtype=np.int64)
        for back in range(self.order - 1):
            h = (h * 1_000_003) ^ x[np.maximum(np.arange(s, len(y)) - back, 0)]
        return np.abs(h) % self.buckets, np.abs((h * 1_000_003) ^ y[s:]) % self.buckets

    def blend(self, nll: Tensor, x: Tensor, y: Tensor, s: int) -> Tensor:
        ctx, full = self.keys(x.cpu().numpy(), y.cpu().numpy(), s)
        seen = self.ctx[ctx]
        ratio = np.where(seen > 0, self.full[full] / np.maximum(seen, 1), 0.0)
        p_ng = torch.from_numpy(ratio).to(nll)
        p = torch.where(p_ng > 0, (1 - self.alpha) * torch.exp(-nll) + self.alpha * p_ng, torch.exp(-nll))
        np.add.at(self.ctx, ctx, 1)
        np.add.at(self.full, full, 1)
        return -torch.log(p)


def eval_slot(hp, net, rank, world, device, split_ids, sizes, stride) -> tuple[float, float]:
    """SLOT as in run 27: a shared shift of the features states, fitted on each batch. Not causal; kept for comparison."""
    seq = hp.eval_seq_len
    starts = window_starts(split_ids.numel() - 1, seq, stride)
    mine = starts[len(starts) * rank // world : len(starts) * (rank + 1) // world]
    nats, n_targets, n_bytes = no_sums(device)
    net.eval()
    for bi in range(0, len(mine), hp.eval_batch_seqs):
        batch = mine[bi : bi + hp.eval_batch_seqs]
        x, y = gather_windows(split_ids, batch, seq, device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            h = net.features(x).float()
        delta = torch.zeros(1, 1, h.size(-1), device=device, requires_grad=True)
        opt = torch.optim.AdamW([delta], lr=hp.slot_lr, weight_decay=1e-8)
        for _ in range(hp.slot_steps):
            opt.zero_grad()
            logits = net.project(h + delta).float()
            F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1)).backward()
            opt.step()
        with torch.no_grad():
            logits = net.project(h + delta).float()
            nll = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y.reshape(-1), reduction="none").view_as(y)
            for row, ws in enumerate(batch):
                s = scored_from(ws, seq, stride)
                nats += nll[row, s:].to(torch.float64).sum()
                n_targets += seq - s
                n_bytes += count_bytes(x[row, s:], y[row, s:], sizes)
    pool(nats, n_targets, n_bytes)
    return to_bpb(nats, n_targets, n_bytes)


def prequant_adapt(hp, net, rank, world, device, split_ids, say) -> None:
    """Adaptation on the split before quantising (run 19). It reads what it will be graded on: epochs stay 0."""
    seq = hp.eval_seq_len
    total = (split_ids.numel() - 1) // seq
    opt = torch.optim.AdamW(net.parameters(), lr=hp.prequant_ttt_lr, weight_decay=0.0)
    net.train()
    for epoch in range(hp.prequant_ttt_epochs):
        for b in range(total * rank // world, total * (rank + 1) // world, 8):
            e = min(b + 8, total * (rank + 1) // world)
            local = split_ids[b * seq : e * seq + 1].to(device=device, dtype=torch.int64)
            opt.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = net(local[:-1].reshape(-1, seq), local[1:].reshape(-1, seq))
            loss.backward()
            for p in net.parameters():
                if world > 1 and p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            opt.step()
        say(f"prequant_ttt epoch {epoch + 1}/{hp.prequant_ttt_epochs} loss {loss.item():.4f}")


def find_temperature(hp, net, rank, world, device, split_ids, sizes, say) -> float:
    """Grid over the softmax temperature on the first million tokens of the split (run 35). TEMP_SEARCH stays 0."""
    piece = split_ids[: 1_048_576 + 1]
    best_t, best_bpb = 1.0, float("inf")
    for t in (0.94, 0.96, 0.98, 1.0, 1.02):
        _, bpb = eval_windows(hp, net, rank, world, device, piece, sizes, 512, temperature=t)
        say(f"temp_search T:{t:.2f} val_bpb:{bpb:.5f}")
        if bpb < best_bpb:
            best_t, best_bpb = t, bpb
    return best_t


# ---------------------------------------------------------------- quantisation


def row_scales(w: Tensor, top: int) -> Tensor:
    # the clip, out of five per row, with the least squared error; fp16 as it will be stored
    best_err = torch.full((w.size(0),), float("inf"), device=w.device)
    best = torch.ones(w.size(0), device=w.device)
    mags = w.abs()
    for pct in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.quantile(mags, pct, dim=1) if pct < 1.0 else mags.amax(dim=1)
        s = (clip / top).clamp_min(1e-6).half().float()
        q = (w / s[:, None]).round().clamp(-top, top) * s[:, None]
        err = (q - w).square().sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best = torch.where(better, s, best)
    return best


def round_rows(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    s = row_scales(w.float(), top)
    q = (w.float() / s[:, None]).round().clamp(-top, top)
    return q.to(torch.int8), s.half()


def gptq_quantize(w: Tensor, hessian: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Columns by falling diagonal of H, error fed forward through the Cholesky factor of the inverse."""
    top = 2 ** (bits - 1) - 1
    w = w.float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(damp * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True)
    back = torch.argsort(order)
    w, h = w[:, order], h[order][:, order]
    try:
        inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
        u = torch.linalg.cholesky(inv, upper=True)
    except RuntimeError:
        return round_rows(w[:, back], bits)
    s = row_scales(w, top)
    codes = torch.zeros_like(w)
    cols = w.size(1)
    for b0 in range(0, cols, block):
        b1 = min(b0 + block, cols)
        errs = torch.zeros(w.size(0), b1 - b0, device=w.device)
        for j in range(b0, b1):
            q = (w[:, j] / s).round().clamp(-top, top)
            codes[:, j] = q
            err = (w[:, j] - q * s) / u[j, j]
            errs[:, j - b0] = err
            if j + 1 < b1:
                w[:, j + 1 : b1] -= err[:, None] * u[j, j + 1 : b1][None, :]
        if b1 < cols:
            w[:, b1:] -= errs @ u[b0:b1, b1:]
    return codes[:, back].to(torch.int8), s.half()


def gather_hessians(net: Decoder, batches, device) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []

    def watch(name: str):
        def hook(module, inputs, output):
            a = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in sums:
                sums[name] = torch.zeros(a.size(1), a.size(1), device=device)
                counts[name] = 0
            sums[name].addmm_(a.T, a)
            counts[name] += a.size(0)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, Dense) and name.startswith("blocks."):
            hooks.append(module.register_forward_hook(watch(name)))
    net.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for x in batches:
            net.logits_of(x)
    for hook in hooks:
        hook.remove()
    return {name: s / counts[name] for name, s in sums.items()}


def calibration_batches(hp, source: str, feed, split_ids: Tensor, rank: int, world: int, device):
    """Inputs for the Hessians. The submission calibrates on training text; the rest was for comparison."""
    for i in range(hp.gptq_calib_batches):
        if source == "train":
            yield feed.rows(hp.eval_seq_len * 4 * world, hp.eval_seq_len, 1)[0]
        elif source == "random":
            yield torch.randint(0, hp.vocab_size, (4, hp.eval_seq_len), device=device)
        elif source == "val":
            at = (i * world + rank) * 4 * hp.eval_seq_len
            yield split_ids[at : at + 4 * hp.eval_seq_len].to(device, torch.int64).view(4, -1)
        else:
            raise ValueError(f"CALIB_SOURCE={source}: train, random or val")


def bits_of(hp, name: str) -> int:
    if name.endswith(("wte.weight", "embed.weight")):
        return hp.embed_bits
    return hp.mlp_bits if ".mlp." in name else hp.quant_bits


def prune_small(state: dict[str, Tensor], frac: float) -> None:
    for name, t in state.items():
        if frac > 0 and t.ndim == 2 and t.numel() > 65_536:
            cut = t.abs().float().flatten().kthvalue(max(int(frac * t.numel()), 1)).values
            t[t.abs() < cut] = 0


def quantize_model(hp, state: dict[str, Tensor], hessians: dict[str, Tensor], device) -> dict:
    packed: dict[str, Tensor] = OrderedDict()
    meta: dict[str, str] = {}
    for name, t in state.items():
        t = t.detach()
        if t.ndim != 2 or t.numel() <= 65_536 or any(c in name for c in CONTROL):
            packed[name] = t.to(torch.float16 if t.is_floating_point() else t.dtype).cpu()
            meta[name] = f"keep:{str(t.dtype).removeprefix('torch.')}"
            continue
        bits = bits_of(hp, name)
        module = name.removesuffix(".weight")
        w = t.to(device)
        if hp.gptq_enabled and module in hessians:
            q, s = gptq_quantize(w, hessians[module], bits, hp.gptq_block, hp.gptq_damp)
        else:
            q, s = round_rows(w, bits)
        packed[name + ".q"], packed[name + ".scale"] = q.cpu(), s.cpu()
        meta[name] = f"rows:{str(t.dtype).removeprefix('torch.')}"
    return {"w": packed, "m": meta}


def dequantize_model(obj: dict) -> dict[str, Tensor]:
    state = {}
    for name, how in obj["m"].items():
        kind, dtype = how.split(":")
        if kind == "keep":
            state[name] = obj["w"][name].to(getattr(torch, dtype))
        else:
            q, s = obj["w"][name + ".q"], obj["w"][name + ".scale"]
            state[name] = (q.float() * s.float()[:, None]).to(getattr(torch, dtype))
    return state


def compress(raw: bytes, how: str) -> bytes:
    if how == "zstd" and zstandard is not None:
        return zstandard.ZstdCompressor(level=22).compress(raw)
    if how == "lzma":
        return lzma.compress(raw, preset=9)
    return zlib.compress(raw, 9)


def decompress(blob: bytes, how: str) -> bytes:
    if how == "zstd" and zstandard is not None:
        return zstandard.ZstdDecompressor().decompress(blob)
    if how == "lzma":
        return lzma.decompress(blob)
    return zlib.decompress(blob)


# ---------------------------------------------------------------- weight averages


class Averages:
    """EMA of every step; SWA sums if asked for (SWA_ENABLED)."""

    def __init__(self, hp: Knobs, model: nn.Module):
        self.hp = hp
        self.ema = {n: t.detach().float().clone() for n, t in model.state_dict().items()}
        self.swa: dict[str, Tensor] | None = None
        self.swa_n = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, scale: float) -> None:
        d = self.hp.ema_decay
        for n, t in model.state_dict().items():
            self.ema[n].mul_(d).add_(t.detach().float(), alpha=1 - d)
        if self.hp.swa_enabled and scale < self.hp.swa_start_scale and step % self.hp.swa_every == 0:
            if self.swa is None:
                self.swa = {n: torch.zeros_like(t) for n, t in self.ema.items()}
            for n, t in model.state_dict().items():
                self.swa[n] += t.detach().float()
            self.swa_n += 1

    def get(self, which: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
        if which == "swa" and self.swa is not None:
            return {n: (self.swa[n] / self.swa_n).to(t.dtype) for n, t in like.items()}
        return {n: self.ema[n].to(t.dtype) for n, t in like.items()}


def apply_average(hp, averages: Averages, net: nn.Module, validate, say) -> None:
    if hp.avg_select == "none":
        return
    like = net.state_dict()
    if hp.avg_select == "best":
        results = {}
        for which in ("ema", "swa"):
            net.load_state_dict(averages.get(which, like))
            results[which] = validate()[1]
            say(f"average:{which} val_bpb:{results[which]:.4f}")
        which = min(results, key=results.get)
    else:
        which = hp.avg_select
    say(f"{which}: applying {which.upper()} weights")
    net.load_state_dict(averages.get(which, like))


# ---------------------------------------------------------------- main


class Log:
    """Prints a line and keeps it in a file; the ranks other than the first say nothing."""

    def __init__(self, path: Path, silent: bool):
        self.path, self.silent = path, silent
        if not silent:
            path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str) -> None:
        if self.silent:
            return
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as kept:
            kept.write(text + "\n")


class Stopwatch:
    """Milliseconds between go() and halt(), which both wait for the device; ms() may be asked while it runs."""

    def __init__(self):
        self.kept, self.since = 0.0, None

    def ms(self) -> float:
        return self.kept + (0.0 if self.since is None else 1000.0 * (time.perf_counter() - self.since))

    def go(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def halt(self) -> None:
        torch.cuda.synchronize()
        self.kept, self.since = self.ms(), None


def new_net(hp: Knobs, device) -> Decoder:
    """fp32 everywhere but in the tables."""
    net = Decoder(hp)
    for m in net.modules():
        if isinstance(m, nn.Embedding):
            m.to(torch.bfloat16)
    return net.to(device)


def main() -> None:
    global whiten
    code = Path(__file__).read_text(encoding="utf-8")
    hp = Knobs()
    whiten = torch.compile(whiten)

    # ---- who am I
    rank, world, local = whole("RANK", 0), whole("WORLD_SIZE", 1), whole("LOCAL_RANK", 0)
    distributed = world > 1
    micro_steps, uneven = divmod(8, world)
    assert not uneven, f"{world} ranks do not divide a batch of eight parts"
    device = torch.device(f"cuda:{local}")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if distributed:
        dist.init_process_group("nccl")
    say = Log(Path("logs", hp.run_id + ".txt"), silent=rank > 0)
    say(f"Running Python {sys.version}")
    say(f"Running PyTorch {torch.__version__}")
    for seeding in (random.seed, np.random.seed, torch.manual_seed):
        seeding(hp.seed)

    # ---- what is read
    sp = spm.SentencePieceProcessor(model_file=hp.piece_model)
    sizes = piece_sizes(sp, hp.vocab_size, device)
    split_ids = read_split(hp)
    say(f"val_loader:shards pattern={hp.split_shards} tokens:{split_ids.numel() - 1}")

    # ---- what is trained
    net = new_net(hp, device)
    model = torch.compile(net, dynamic=False, fullgraph=True)
    if distributed:
        model = DDP(model, device_ids=[local], broadcast_buffers=False)

    tables, matrices, scalars = [], [], []
    for name, p in net.named_parameters():
        if name.endswith(("wte.weight", "embed.weight")):
            tables.append(p)
        elif p.ndim == 2 and not any(c in name for c in CONTROL):
            matrices.append(p)
        else:
            scalars.append(p)
    def adamw(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        group = {"params": params, "lr": lr, "peak_lr": lr}
        return torch.optim.AdamW([group], betas=hp.betas, eps=hp.adam_eps, weight_decay=hp.adam_wd, fused=True)

    muon = Muon(
        [{"params": matrices, "peak_lr": hp.matrix_lr}],
        lr=hp.matrix_lr,
        momentum=hp.muon_momentum,
        backend_steps=hp.muon_backend_steps,
        weight_decay=hp.muon_wd,
        row_norm=hp.muon_eq_r,
    )
    optimizers = [adamw(tables, hp.tied_embed_lr), muon, adamw(scalars, hp.scalar_lr)]
    say(f"model_params:{sum(p.numel() for p in net.parameters())}")
    say(f"world_size:{world} grad_accum_steps:{micro_steps} seed:{hp.seed}")

    feed = RankFeed(hp.train_shards, rank, world, device)
    cap_ms = 1000.0 * hp.max_wallclock_seconds if hp.max_wallclock_seconds > 0 else None
    if cap_ms is not None and hp.gptq_enabled:
        cap_ms -= 1000.0 * hp.gptq_reserve_seconds  # the Hessians read training text: inside the ten minutes

    def drop_grads() -> None:
        for o in optimizers:
            o.zero_grad()

    def lr_factor(step: int, ms: float) -> float:
        """1, then down to 0 over the last warmdown_iters steps, in time if there is a cap and in steps if not."""
        if hp.warmdown_iters <= 0:
            return 1.0
        if cap_ms is None:
            steps_left = float(hp.iterations - step)
        else:
            steps_left = (cap_ms - ms) * step / ms if step and ms else math.inf
        return min(max(steps_left / hp.warmdown_iters, 0.0), 1.0)

    def forward_backward() -> Tensor:
        total = torch.zeros((), device=device)
        for micro in range(micro_steps):
            waits = distributed and micro + 1 < micro_steps  # gradients are shared once, at the last part
            with model.no_sync() if waits else nullcontext():
                x, y = feed.rows(hp.train_batch_tokens, hp.train_seq_len, micro_steps)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(x, y) / micro_steps
                loss.backward()
            total += loss.detach()
        return total

    # ---- compile everything on throw-away steps
    if hp.warmup_steps > 0:
        before = copy.deepcopy([thing.state_dict() for thing in (net, *optimizers)])
        for _ in range(hp.warmup_steps):
            forward_backward()
            for o in optimizers:
                o.step()
            drop_grads()
        for thing, state in zip((net, *optimizers), before):
            thing.load_state_dict(state)
        feed = RankFeed(hp.train_shards, rank, world, device)
        say(f"warmup_step:{hp.warmup_steps}/{hp.warmup_steps}")

    averages = Averages(hp, net)
    clock = Stopwatch()

    def validate() -> tuple[float, float]:
        return eval_blocks(hp, model, rank, world, device, micro_steps, split_ids, sizes)

    def pace(step: int) -> str:
        ms = clock.ms()
        return f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"

    def look(step: int) -> None:
        clock.halt()
        loss, bpb = validate()
        say(f"step:{step}/{hp.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} {pace(step)}")
        clock.go()

    # ---- train
    step, over = 0, False
    clock.go()
    while step < hp.iterations and not over:
        if hp.val_loss_every > 0 and step % hp.val_loss_every == 0:
            look(step)
        scale = lr_factor(step, clock.ms())
        if scale < hp.late_qat_threshold and not Dense._qat_enabled:
            Dense._qat_enabled = True
            say(f"late_qat: on at step:{step} scale:{scale:.3f}")
        drop_grads()
        train_loss = forward_backward()
        warm = min(step / max(hp.muon_momentum_warmup_steps, 1), 1.0)
        muon.param_groups[0]["momentum"] = torch.lerp(
            torch.tensor(hp.muon_momentum_warmup_start), torch.tensor(hp.muon_momentum), warm
        ).item()
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = scale * group["peak_lr"]
        if hp.grad_clip_norm > 0:
            nn.utils.clip_grad_norm_(net.parameters(), hp.grad_clip_norm)
        for o in optimizers:
            o.step()
        averages.update(net, step, scale)
        step += 1
        if hp.train_log_every > 0 and (step <= 5 or step % hp.train_log_every == 0):
            say(f"step:{step}/{hp.iterations} train_loss:{train_loss.item():.4f} {pace(step)}")
        if cap_ms is not None:
            late = torch.tensor(float(clock.ms() >= cap_ms), device=device)
            pool(late)  # one late rank ends it for all of them, on the same step
            over = late.item() > 0
    look(step)
    clock.halt()
    train_ms = clock.ms()
    if over:
        say(f"stopping_early: wallclock_cap train_time:{train_ms:.0f}ms step:{step}/{hp.iterations}")
    Dense._qat_enabled = False
    say(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    apply_average(hp, averages, net, validate, say)

    # ---- calibration: still on the training clock
    torch.cuda.synchronize()
    t_calib = time.perf_counter()
    hessians: dict[str, Tensor] = {}
    if hp.gptq_enabled:
        batches = calibration_batches(hp, hp.calib_source, feed, split_ids, rank, world, device)
        hessians = gather_hessians(net, batches, device)
        for h in hessians.values():
            if distributed:
                dist.all_reduce(h, op=dist.ReduceOp.AVG)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t_calib)
    say(f"gptq:calibration on {hp.calib_source} shards took {calib_ms:.0f}ms, train+gptq {train_ms + calib_ms:.0f}ms")

    if hp.prequant_ttt_epochs > 0:
        prequant_adapt(hp, net, rank, world, device, split_ids, say)

    # ---- artifact
    state = {n: t.detach().clone() for n, t in net.state_dict().items()}
    prune_small(state, hp.prune_frac)
    packed = quantize_model(hp, state, hessians, device)
    buf = io.BytesIO()
    torch.save(packed, buf)
    blob = compress(buf.getvalue(), hp.compressor)
    if rank == 0:
        Path("final_model.ptz").write_bytes(blob)
        code_bytes = len(code.encode("utf-8"))
        say(f"Serialized model {hp.compressor}: {len(blob)} bytes")
        say(f"Code size: {code_bytes} bytes")
        say(f"Total submission size: {len(blob) + code_bytes} bytes")
        if len(blob) + code_bytes >= 16_000_000:
            say("WARNING: over 16,000,000 bytes")
    if distributed:
        dist.barrier()

    # ---- everything from here on uses the artifact as read back from disk
    restored = torch.load(
        io.BytesIO(decompress(Path("final_model.ptz").read_bytes(), hp.compressor)), map_location="cpu", weights_only=False
    )
    eval_model = new_net(hp, device)
    eval_model.load_state_dict(dequantize_model(restored), strict=True)

    torch.cuda.synchronize()
    t = time.perf_counter()
    loss, bpb = eval_blocks(hp, eval_model, rank, world, device, micro_steps, split_ids, sizes)
    torch.cuda.synchronize()
    say(f"final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * (time.perf_counter() - t):.0f}ms")

    temperature = hp.eval_temperature
    if hp.temp_search:
        temperature = find_temperature(hp, eval_model, rank, world, device, split_ids, sizes, say)

    def new_mixer() -> HashedNgram | None:
        return HashedNgram(hp.ngram_order, hp.ngram_buckets, hp.ngram_alpha) if hp.ngram_alpha > 0 else None

    torch.cuda.synchronize()
    t = time.perf_counter()
    loss, bpb = eval_windows(
        hp, eval_model, rank, world, device, split_ids, sizes, hp.eval_stride, temperature, new_mixer()
    )
    torch.cuda.synchronize()
    say(
        f"final_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{hp.eval_stride} "
        f"eval_time:{1000 * (time.perf_counter() - t):.0f}ms"
    )
    say(f"final_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")

    if hp.ttt_enabled:
        torch.cuda.synchronize()
        t = time.perf_counter()
        loss, bpb = eval_adaptive(
            hp, eval_model, rank, world, device, split_ids, sizes, hp.eval_stride, temperature, new_mixer(), say
        )
        torch.cuda.synchronize()
        say(f"legal_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * (time.perf_counter() - t):.0f}ms")
        say(f"legal_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        if hp.ttt_rescore:
            loss, bpb = eval_windows(
                hp, eval_model, rank, world, device, split_ids, sizes, hp.eval_stride, temperature
            )
            say(f"ttt_rescored_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")

    if hp.slot_steps > 0:
        loss, bpb = eval_slot(hp, eval_model, rank, world, device, split_ids, sizes, hp.eval_stride)
        say(f"slot_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
