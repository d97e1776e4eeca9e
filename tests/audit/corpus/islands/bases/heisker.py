"""SP8192 CaseOps | varlen flash attention | loop recurrence | GPTQ-SDClip + brotli | phased score-first TTT.

torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

import base64
import collections
import copy
import glob
import io
import lzma
import math
import os
import random
import re
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
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from torch import Tensor, nn

# ---------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------


class Hyperparameters:
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    artifact_dir = os.environ.get("ARTIFACT_DIR", "")

    # schedule
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    min_lr = float(os.environ.get("MIN_LR", 0.05))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 14.0))

    # validation and evaluation
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524288))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "0")))
    max_eval_seconds = float(os.environ.get("MAX_EVAL_SECONDS", 600.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    smear_gate = bool(int(os.environ.get("SMEAR_GATE", "1")))
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))

    # optimizers
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_std = float(os.environ.get("EMBED_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.026))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # quantisation
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 16))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    mlp_clip_sigmas = float(os.environ.get("MLP_CLIP_SIGMAS", 12.0))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 15.0))
    max_submission_bytes = 16_000_000

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 96))
    ttt_lora_alpha = float(os.environ.get("TTT_LORA_ALPHA", 144.0))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 1e-4))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 48))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_grad_steps = int(os.environ.get("TTT_GRAD_STEPS", 1))
    ttt_weight_decay = float(os.environ.get("TTT_WEIGHT_DECAY", 1.0))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.0))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.999))
    ttt_adapt_seconds = float(os.environ.get("TTT_ADAPT_SECONDS", 540.0))
    phased_ttt_prefix_docs = int(os.environ.get("PHASED_TTT_PREFIX_DOCS", 2500))
    phased_ttt_num_phases = int(os.environ.get("PHASED_TTT_NUM_PHASES", 3))
    global_ttt_lr = float(os.environ.get("GLOBAL_TTT_LR", 1e-3))
    global_ttt_momentum = float(os.environ.get("GLOBAL_TTT_MOMENTUM", 0.9))
    global_ttt_chunk_tokens = int(os.environ.get("GLOBAL_TTT_CHUNK_TOKENS", 262144))
    global_ttt_grad_clip = float(os.environ.get("GLOBAL_TTT_GRAD_CLIP", 1.0))

    # machine
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # files
    caseops_enabled = bool(int(os.environ.get("CASEOPS_ENABLED", "1")))
    dataset_name = "fineweb10B_sp8192_caseops" if caseops_enabled else "fineweb10B_sp8192"
    tokenizer_name = "fineweb_8192_bpe_caseops.model" if caseops_enabled else "fineweb_8192_bpe.model"
    datasets_dir = os.path.join(data_dir, "datasets", dataset_name)
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    val_bytes_files = os.path.join(datasets_dir, "fineweb_val_bytes_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", tokenizer_name)
    logfile = os.path.join(artifact_dir, f"{run_id}.txt") if artifact_dir else f"logs/{run_id}.txt"
    model_path = os.path.join(artifact_dir, "final_model.pt")
    quantized_model_path = os.path.join(artifact_dir, "final_model.int6.ptz")


BOS_ID = 1
SHARD_MAGIC = 20240520
HEADER_INTS = 256
CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "smear")

_logger_hparams = None


def set_logging_hparams(h):
    global _logger_hparams
    _logger_hparams = h


def log(msg, console=True):
    if _logger_hparams is None:
        print(msg)
        return
    if _logger_hparams.is_main_process:
        if console:
            print(msg)
        with open(_logger_hparams.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ---------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------


def load_data_shard(file):
    header = np.fromfile(file, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header in {file}")
    num_tokens = int(header[2])
    body = np.fromfile(file, dtype="<u2", count=num_tokens, offset=HEADER_INTS * 4)
    if body.size != num_tokens:
        raise ValueError(f"short read in {file}")
    return torch.from_numpy(body.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    # the pattern of the tokens also catches the byte sidecar's files
    files = [Path(p) for p in sorted(glob.glob(pattern)) if "_bytes_" not in os.path.basename(p)]
    if not files:
        raise FileNotFoundError(f"no validation shards for {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def load_validation_byte_sidecar(pattern, expected_len):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no byte sidecar for {pattern}")
    counts = torch.cat([load_data_shard(file) for file in files]).to(torch.int32).contiguous()
    if counts.numel() != expected_len:
        raise ValueError(f"byte sidecar has {counts.numel()} entries for {expected_len} tokens")
    return counts


def build_sentencepiece_luts(sp, vocab_size, device):
    """Per token id: UTF-8 bytes without the leading space, has-leading-space, is-boundary."""
    table_size = max(int(sp.vocab_size()), vocab_size)
    base_bytes = np.zeros(table_size, dtype=np.int16)
    leading_space = np.zeros(table_size, dtype=np.bool_)
    boundary = np.ones(table_size, dtype=np.bool_)
    for token_id in range(int(sp.vocab_size())):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("▁"):
            leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.replace("▁", " ").encode("utf-8"))
    return (
        torch.tensor(base_bytes, dtype=torch.int16, device=device),
        torch.tensor(leading_space, dtype=torch.bool, device=device),
        torch.tensor(boundary, dtype=torch.bool, device=device),
    )


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(self.sp.vocab_size())}")
        self.val_tokens = load_validation_tokens(h.val_files)
        luts = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_token_lut = luts
        self.val_bytes = None
        if h.caseops_enabled:
            # The tokens spell a transformed text; the bytes of the original come from the sidecar.
            self.val_bytes = load_validation_byte_sidecar(h.val_bytes_files, self.val_tokens.numel())

    def token_bytes(self, positions, prev_ids, target_ids):
        """Original UTF-8 bytes of the targets. positions: their places in val_tokens, on the CPU."""
        if self.val_bytes is not None:
            return self.val_bytes[positions].to(target_ids.device, torch.float64)
        counts = self.base_bytes_lut[target_ids].to(torch.float64)
        counts += (self.has_leading_space_lut[target_ids] & ~self.is_boundary_token_lut[prev_ids]).to(torch.float64)
        return counts


def build_cu_seqlens(tokens, max_len, bucket=64):
    """Starts of the sequences in a flat run of tokens: at every BOS and after max_len tokens, padded to a bucket."""
    total = tokens.numel()
    starts = (tokens == BOS_ID).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    seq_starts = []
    for start, end in zip(starts, starts[1:] + [total]):
        seq_starts.extend(range(start, end, max_len))
    padded = -(-(len(seq_starts) + 1) // bucket) * bucket
    cu = torch.full((padded,), total, dtype=torch.int32)
    cu[: len(seq_starts)] = torch.tensor(seq_starts, dtype=torch.int32)
    return cu


class TokenStream:
    """Reads the train shards one after another, in an order drawn from the seed, for ever."""

    def __init__(self, pattern, seed):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no train shards for {pattern}")
        self.rng = random.Random(seed)
        self.queue = []
        self.tokens = None
        self.pos = 0
        self._advance()

    def _advance(self):
        if not self.queue:
            self.queue = list(self.files)
            self.rng.shuffle(self.queue)
        self.tokens = load_data_shard(self.queue.pop())
        self.pos = 0

    def take(self, n):
        parts = []
        while n > 0:
            avail = self.tokens.numel() - self.pos
            if avail <= 0:
                self._advance()
                continue
            k = min(n, avail)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DocumentPackingLoader:
    """Every rank walks the same stream and keeps its own slice, packed as one row with cu_seqlens."""

    def __init__(self, h, device):
        self.h = h
        self.device = device
        self.stream = TokenStream(h.train_files, h.seed)

    def next_batch(self, global_tokens, grad_accum_steps):
        local = global_tokens // (self.h.world_size * grad_accum_steps)
        span = local + 1
        chunk = self.stream.take(span * self.h.world_size)
        mine = chunk[self.h.rank * span : (self.h.rank + 1) * span].to(torch.int64)
        x, y = mine[:-1], mine[1:]
        cu = build_cu_seqlens(x, self.h.train_seq_len)
        to = dict(device=self.device, non_blocking=True)
        return x.pin_memory().to(**to)[None], y.pin_memory().to(**to)[None], cu.pin_memory().to(**to)


# ---------------------------------------------------------------------------
# model
# ---------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, rope_dims, base, max_len):
        super().__init__()
        inv_freq = 1.0 / base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims)
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos", freqs.cos(), persistent=False)
        self.register_buffer("sin", freqs.sin(), persistent=False)

    def forward(self, positions, dtype):
        """positions: any shape of ints; returns cos and sin with a head axis before the last."""
        return self.cos[positions].unsqueeze(-2).to(dtype), self.sin[positions].unsqueeze(-2).to(dtype)


def apply_rotary(x, cos, sin, rope_dims):
    rot, keep = x[..., :rope_dims], x[..., rope_dims:]
    a, b = rot.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, keep], dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.num_heads, self.num_kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        self.max_len = h.train_seq_len
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init, dtype=torch.float32))

    def forward(self, x, rope, cu_seqlens=None, lora=None, slot=0):
        bsz, length, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q = q + lora.q[slot](x)
            k = k + lora.k[slot](x)
            v = v + lora.v[slot](x)
        q = q.view(bsz, length, self.num_heads, self.head_dim)
        k = k.view(bsz, length, self.num_kv_heads, self.head_dim)
        v = v.view(bsz, length, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        q = apply_rotary(q, *rope, self.rope_dims) * self.q_gain.to(q.dtype)[:, None]
        k = apply_rotary(k, *rope, self.rope_dims)
        if cu_seqlens is not None:
            y = flash_attn_varlen_func(
                q[0].contiguous(),
                k[0].contiguous(),
                v[0].contiguous(),
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=self.max_len,
                max_seqlen_k=self.max_len,
                causal=True,
            )[None]
        else:
            y = flash_attn_func(q, k, v, causal=True)
        y = y.reshape(bsz, length, dim)
        out = self.proj(y)
        if lora is not None:
            out = out + lora.o[slot](y)
        return out


class MLP(nn.Module):
    def __init__(self, dim, mult):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.ln_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x, x0, rope, cu_seqlens=None, lora=None, slot=0):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_out = self.attn(self.attn_norm(x) * self.ln_scale, rope, cu_seqlens, lora, slot)
        x = x + self.attn_scale.to(x.dtype) * attn_out
        mlp_in = self.mlp_norm(x) * self.ln_scale
        mlp_out = self.mlp(mlp_in)
        if lora is not None:
            mlp_out = mlp_out + lora.mlp[slot](mlp_in)
        return x + self.mlp_scale.to(x.dtype) * mlp_out


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h
        self.softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList(Block(h, i) for i in range(h.num_layers))
        self.rotary = Rotary(h.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len))
        self.final_norm = RMSNorm()
        if h.smear_gate:
            self.smear_gate = CastedLinear(12, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        plain = list(range(h.num_layers))
        loop = list(range(h.loop_start, h.loop_end + 1))
        looped = plain[: h.loop_start] + loop * (h.num_loops + 1) + plain[h.loop_end + 1 :]
        self.orders = {False: plain, True: looped}
        self.looping_active = False
        self.num_slots = len(looped)
        num_skips = len(looped) // 2
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, h.model_dim))
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.h.embed_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("proj") or name == "smear_gate":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def _embed(self, input_ids):
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.h.smear_gate:
            gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :12]))
            # a document's first token takes nothing from the document before it
            gate = gate * (input_ids[:, 1:] != BOS_ID).unsqueeze(-1).to(x.dtype)
            x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        return x

    def _hidden(self, input_ids, cu_seqlens=None, lora=None):
        x = self._embed(input_ids)
        x0 = x
        length = input_ids.size(1)
        positions = torch.arange(length, device=input_ids.device, dtype=torch.int32)
        if cu_seqlens is not None:
            positions = positions - cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]
        rope = self.rotary(positions, x.dtype)
        order = self.orders[self.looping_active]
        half = len(order) // 2
        skips = []
        for slot, layer in enumerate(order):
            if slot < half:
                x = self.blocks[layer](x, x0, rope, cu_seqlens, lora, slot)
                skips.append(x)
                continue
            i = slot - (len(order) - half)
            if i >= 0:
                skip = self.skip_weights[i].to(x.dtype) * skips.pop()
                g = torch.sigmoid(self.skip_gates[i].to(x.dtype))
                x = g * x + (1.0 - g) * skip
            x = self.blocks[layer](x, x0, rope, cu_seqlens, lora, slot)
        return self.final_norm(x)

    def _cap(self, logits):
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward_logits(self, input_ids, cu_seqlens=None):
        hidden = self._hidden(input_ids, cu_seqlens)
        return self._cap(F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)))

    def forward(self, input_ids, target_ids, cu_seqlens=None, reduction="mean"):
        logits = self.forward_logits(input_ids, cu_seqlens)
        return F.cross_entropy(logits.flatten(0, 1).float(), target_ids.flatten(), reduction=reduction)

    def forward_ttt(self, input_ids, target_ids, lora):
        """Losses per token, (batch, length); each row has an adapter of its own."""
        hidden = self._hidden(input_ids, None, lora)
        logits = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)) + lora.lm_head(hidden)
        logits = self._cap(logits)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), target_ids.flatten(), reduction="none")
        return losses.view(target_ids.shape)


class BatchedLinearLoRA(nn.Module):
    """One low-rank adapter per row of the batch. B starts at zero, so a fresh adapter changes nothing."""

    def __init__(self, bsz, in_features, out_features, rank, alpha):
        super().__init__()
        self.scale = alpha / rank
        self.bound = 1.0 / math.sqrt(in_features)
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features).uniform_(-self.bound, self.bound))
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))

    def reset(self):
        with torch.no_grad():
            self.A.uniform_(-self.bound, self.bound)
            self.B.zero_()

    def forward(self, x):
        return (x @ self.A.transpose(1, 2).to(x.dtype)) @ self.B.transpose(1, 2).to(x.dtype) * self.scale


class BatchedTTTLoRA(nn.Module):
    def __init__(self, bsz, model, h):
        super().__init__()
        self.bsz = bsz
        dim = h.model_dim
        kv_dim = h.num_kv_heads * (dim // h.num_heads)

        def stack(n_in, n_out):
            rows = (BatchedLinearLoRA(bsz, n_in, n_out, h.ttt_lora_rank, h.ttt_lora_alpha) for _ in range(slots))
            return nn.ModuleList(rows)

        slots = model.num_slots
        self.q, self.k, self.v = stack(dim, dim), stack(dim, kv_dim), stack(dim, kv_dim)
        self.o, self.mlp = stack(dim, dim), stack(dim, dim)
        self.lm_head = BatchedLinearLoRA(bsz, dim, h.vocab_size, h.ttt_lora_rank, h.ttt_lora_alpha)

    def reset(self):
        for module in self.modules():
            if isinstance(module, BatchedLinearLoRA):
                module.reset()


# ---------------------------------------------------------------------------
# optimizers
# ---------------------------------------------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G, steps):
    a, b, c = 3.4445, -4.775, 2.0315
    X = G.bfloat16()
    X = X / (X.norm() + 1e-7)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self):
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(buf, group["momentum"])
                    g = zeropower_via_newtonschulz5(g, group["backend_steps"])
                    g = g * max(1.0, g.size(0) / g.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = g.flatten()
                offset += p.numel()
            if world > 1:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            offset = 0
            for p in params:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(flat[offset : offset + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                offset += p.numel()


def is_control(name):
    return any(pattern in name for pattern in CONTROL_PATTERNS)


class Optimizers:
    def __init__(self, h, model):
        self.h = h
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and n.startswith("blocks.") and not is_control(n)]
        chosen = {id(p) for p in matrices} | {id(model.tok_emb.weight)}
        scalars = [p for _, p in named if id(p) not in chosen]
        betas = (h.beta1, h.beta2)
        self.embed = torch.optim.AdamW(
            [model.tok_emb.weight], lr=h.embed_lr, betas=betas, eps=h.adam_eps, weight_decay=h.embed_wd, fused=True
        )
        self.scalar = torch.optim.AdamW(
            scalars, lr=h.scalar_lr, betas=betas, eps=h.adam_eps, weight_decay=0.02, fused=True
        )
        self.muon = Muon(matrices, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        self.all = [self.embed, self.scalar, self.muon]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        self.params = [p for _, p in named]

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def sync_grads(self):
        if not self.h.distributed:
            return
        grads = [p.grad for p in self.params if p.grad is not None]
        flat = torch.cat([g.flatten().float() for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

    def step(self, step, lr_scale):
        warm = min(step / self.h.muon_momentum_warmup_steps, 1.0) if self.h.muon_momentum_warmup_steps else 1.0
        momentum = (1 - warm) * self.h.muon_momentum_warmup_start + warm * self.h.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
            opt.step()
        self.zero_grad()


def restore_fp32_params(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or is_control(name)) and param.dtype != torch.float32:
            param.data = param.data.float()


# ---------------------------------------------------------------------------
# quantisation: GPTQ, the clip a multiple of the row's standard deviation
# ---------------------------------------------------------------------------


def collect_hessians(model, loader, h, device, deadline):
    """Second moments of the inputs of every matrix, by hooks, over batches of the training stream.

    Stops at the deadline (time.perf_counter), so that train data are read inside the training time only.
    """
    hessians = {}
    rows = {}
    hooks = []

    def add(key, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if key not in hessians:
            hessians[key] = torch.zeros(x.size(1), x.size(1), device=device)
            rows[key] = torch.zeros((), device=device, dtype=torch.float64)
        hessians[key].addmm_(x.T, x)
        rows[key] += x.size(0)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            hooks.append(module.register_forward_hook(lambda m, args, out, key=name: add(key + ".weight", args[0])))
    hooks.append(model.final_norm.register_forward_hook(lambda m, args, out: add("tok_emb.weight", out)))
    model.eval()
    done = 0
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(h.gptq_calibration_batches):
            x, _, cu_seqlens = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.forward_logits(x, cu_seqlens)
            torch.cuda.synchronize()
            done += 1
            if time.perf_counter() > deadline:
                break
    for hook in hooks:
        hook.remove()
    for key, hessian in hessians.items():
        if h.distributed:
            dist.all_reduce(hessian)
            dist.all_reduce(rows[key])
        hessian /= rows[key].clamp(min=1).float()
    return {key: hessian.cpu() for key, hessian in hessians.items()}, done


def gptq_quantize_weight(w, hessian, clip_sigmas, bits, block_size=128):
    w = w.detach().float().clone()
    n_rows, n_cols = w.shape
    clip_range = 2 ** (bits - 1) - 1
    H = hessian.float().to(w.device).clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    H.diagonal().add_(0.01 * H.diagonal().mean())
    perm = torch.argsort(H.diagonal(), descending=True)
    inv_perm = torch.argsort(perm)
    w_perm = w[:, perm].clone()
    w_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    scale = (clip_sigmas * w.std(dim=1) / clip_range).clamp_min(1e-10).half()
    sf = scale.float()
    Q = torch.zeros(n_rows, n_cols, dtype=torch.int8, device=w.device)
    for i1 in range(0, n_cols, block_size):
        i2 = min(i1 + block_size, n_cols)
        block = w_perm[:, i1:i2].clone()
        inv = Hinv[i1:i2, i1:i2]
        errors = torch.zeros_like(block)
        for j in range(i2 - i1):
            col = block[:, j]
            q = torch.clamp(torch.round(col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q.to(torch.int8)
            err = (col - q * sf) / inv[j, j]
            errors[:, j] = err
            block[:, j:] -= err.unsqueeze(1) * inv[j, j:].unsqueeze(0)
        if i2 < n_cols:
            w_perm[:, i2:] -= errors @ Hinv[i1:i2, i2:]
    return Q[:, inv_perm], scale


def gptq_mixed_quantize(state_dict, hessians, h, device):
    result, meta = {}, {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if name not in hessians:
            result[name] = t.cpu().half() if t.is_floating_point() else t.cpu()
            meta[name] = "float16"
            continue
        if name == "tok_emb.weight":
            bits, sigmas = h.embed_bits, h.embed_clip_sigmas
        else:
            bits, sigmas = h.matrix_bits, h.mlp_clip_sigmas if ".mlp." in name else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(t.to(device), hessians[name], sigmas, bits)
        result[name + ".q"], result[name + ".scale"] = q.cpu(), s.cpu()
        meta[name] = f"gptq{bits}"
    counts = collections.Counter(meta.values())
    log("quantized: " + ", ".join(f"{kind}:{n}" for kind, n in sorted(counts.items())))
    return result, meta


def dequantize_mixed(result, meta, template):
    out = {}
    for name, like in template.items():
        if meta[name] == "float16":
            out[name] = result[name].to(like.dtype)
        else:
            q, s = result[name + ".q"].float(), result[name + ".scale"].float()
            out[name] = (q * s.view(-1, 1)).to(like.dtype)
    return out


# ---------------------------------------------------------------------------
# packing
# ---------------------------------------------------------------------------

_BSHF_MAGIC = b"BSHF"


def byte_shuffle(data, stride=2):
    src = np.frombuffer(data, dtype=np.uint8)
    planes = [src[k::stride] for k in range(stride)]
    return _BSHF_MAGIC + bytes([stride]) + np.concatenate(planes).tobytes()


def byte_unshuffle(data):
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(payload.size, dtype=np.uint8)
    offset = 0
    for k in range(stride):
        n = len(range(k, payload.size, stride))
        out[k::stride] = payload[offset : offset + n]
        offset += n
    return out.tobytes()


def compress(data):
    return brotli.compress(byte_shuffle(data), quality=11)


def decompress(data):
    return byte_unshuffle(brotli.decompress(data))


def packed_code(source):
    """The script as the self-extracting one that is submitted."""
    if source.startswith(b"import lzma as L"):
        return source  # it is running packed already
    raw = lzma.compress(source, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    body = base64.b85encode(raw).decode()
    head = "import lzma as L,base64 as B\n"
    tail = f'exec(L.decompress(B.b85decode("{body}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))\n'
    return (head + tail).encode()


def serialize(h, model, hessians, device):
    """Quantises, packs and writes the model; returns the bytes of model plus code."""
    source = Path(__file__).read_bytes()
    code_bytes = len(packed_code(source))
    state = model.state_dict()
    quant_result, quant_meta = gptq_mixed_quantize(state, hessians, h, device)
    buffer = io.BytesIO()
    torch.save({"w": quant_result, "m": quant_meta}, buffer)
    blob = compress(buffer.getvalue())
    total = len(blob) + code_bytes
    if h.is_main_process:
        Path(h.quantized_model_path).write_bytes(blob)
    log(f"Code size (uncompressed): {len(source)} bytes")
    log(f"Code size (packed, counted): {code_bytes} bytes")
    log(f"Serialized model int{h.matrix_bits}+brotli: {len(blob)} bytes")
    log(f"Total submission size: {total} bytes")
    if total > h.max_submission_bytes:
        raise RuntimeError(f"submission of {total} bytes is over {h.max_submission_bytes}")
    if h.distributed:
        dist.barrier()
    return total


def deserialize(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    blob = Path(h.quantized_model_path).read_bytes()
    packed = torch.load(io.BytesIO(decompress(blob)), map_location="cpu")
    model.load_state_dict(dequantize_mixed(packed["w"], packed["m"], model.state_dict()))
    model.looping_active = True
    return model


# ---------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------


class ScoreTally:
    """Sums of losses, tokens and bytes, each target added once, over all ranks in the end."""

    def __init__(self, h, device):
        self.h = h
        self.loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        self.token_count = torch.zeros((), device=device, dtype=torch.float64)
        self.byte_count = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, losses, byte_counts):
        self.loss_sum += losses.to(torch.float64).sum()
        self.token_count += losses.numel()
        self.byte_count += byte_counts.sum()

    def result(self, expected_tokens):
        if self.h.distributed:
            for t in (self.loss_sum, self.token_count, self.byte_count):
                dist.all_reduce(t, op=dist.ReduceOp.SUM)
        tokens = int(self.token_count.item())
        if tokens != expected_tokens:
            raise RuntimeError(f"scored {tokens} tokens of {expected_tokens}")
        val_loss = (self.loss_sum / self.token_count).item()
        val_bpb = self.loss_sum.item() / math.log(2.0) / self.byte_count.item()
        log(f"scored tokens:{tokens} bytes:{int(self.byte_count.item())}", console=False)
        return val_loss, val_bpb


def eval_val(h, device, val_data, model):
    """One pass over the flat validation stream, packed with cu_seqlens; every document within its own attention."""
    tokens = val_data.val_tokens
    total = tokens.numel() - 1
    span = h.val_batch_tokens // h.world_size
    tally = ScoreTally(h, device)
    model.eval()
    with torch.inference_mode():
        for start in range(h.rank * span, total, span * h.world_size):
            end = min(start + span, total)
            n = end - start
            local = tokens[start : end + 1].to(torch.int64)
            x = torch.full((span,), BOS_ID, dtype=torch.int64)
            y = torch.zeros(span, dtype=torch.int64)
            x[:n], y[:n] = local[:-1], local[1:]
            cu = build_cu_seqlens(x, h.eval_seq_len).to(device)
            x, y = x.to(device), y.to(device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses = model(x[None], y[None], cu, reduction="none")
            positions = torch.arange(start + 1, end + 1)
            tally.add(losses[:n], val_data.token_bytes(positions, x[:n], y[:n]))
    model.train()
    return tally.result(total)


def eval_val_sliding(h, device, val_data, model, batch_seqs=32):
    """Windows of eval_seq_len that move by eval_stride; only what no earlier window scored is counted."""
    tokens = val_data.val_tokens
    total = tokens.numel() - 1
    context = h.eval_seq_len - h.eval_stride
    starts = [s for s in range(0, total, h.eval_stride) if s + context < total]
    mine = starts[h.rank :: h.world_size]
    tally = ScoreTally(h, device)
    model.eval()
    with torch.inference_mode():
        for bi in range(0, len(mine), batch_seqs):
            batch = mine[bi : bi + batch_seqs]
            x = torch.zeros(batch_seqs, h.eval_seq_len, dtype=torch.int64)
            y = torch.zeros(batch_seqs, h.eval_seq_len, dtype=torch.int64)
            lengths = []
            for i, s in enumerate(batch):
                n = min(h.eval_seq_len, total - s)
                chunk = tokens[s : s + n + 1].to(torch.int64)
                x[i, :n], y[i, :n] = chunk[:-1], chunk[1:]
                lengths.append(n)
            x, y = x.to(device), y.to(device)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="none").view(x.shape)
            for i, s in enumerate(batch):
                lo, hi = 0 if s == 0 else context, lengths[i]
                positions = torch.arange(s + lo + 1, s + hi + 1)
                tally.add(nll[i, lo:hi], val_data.token_bytes(positions, x[i, lo:hi], y[i, lo:hi]))
    model.train()
    return tally.result(total)


def find_docs(tokens):
    """(start, number of targets) per document; the BOS after a document is its last target, as in the flat stream."""
    starts = (tokens == BOS_ID).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    ends = starts[1:] + [tokens.numel() - 1]
    return [(start, end - start) for start, end in zip(starts, ends) if end > start]


def phase_bounds(h, num_docs):
    prefix = min(h.phased_ttt_prefix_docs, num_docs)
    bounds = [prefix * k // h.phased_ttt_num_phases for k in range(h.phased_ttt_num_phases + 1)]
    return [*bounds, num_docs]


def build_doc_batches(docs, batch_size):
    """Documents of like length together, so that a batch wastes little. Rows never see one another."""
    ordered = sorted(docs, key=lambda d: d[1], reverse=True)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def chunk_window(ci, chunk_size, seq_len):
    """Window of chunk ci inside its document: where it starts, how long it is, where in it the chunk begins."""
    end = (ci + 1) * chunk_size
    win_start = max(0, end - seq_len)
    return win_start, end - win_start, ci * chunk_size - win_start


def make_ttt_optimizer(h, lora):
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lora_lr,
        betas=(h.ttt_beta1, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_weight_decay,
        fused=True,
    )


def score_doc_batch(h, device, val_data, forward_ttt, lora, batch, tally, adapt_until):
    """Chunk by chunk: score with the adapters as they stand, then train every row's adapter on the chunk just scored."""
    tokens = val_data.val_tokens
    lora.reset()
    optimizer = make_ttt_optimizer(h, lora)
    chunk = h.ttt_chunk_size
    counts = [-(-pred_len // chunk) for _, pred_len in batch]
    for ci in range(max(counts)):
        win_start, win_len, offset = chunk_window(ci, chunk, h.eval_seq_len)
        x = torch.zeros(lora.bsz, win_len, dtype=torch.int64)
        y = torch.zeros(lora.bsz, win_len, dtype=torch.int64)
        scored_len = [0] * lora.bsz
        for row, (start, pred_len) in enumerate(batch):
            if ci >= counts[row]:
                continue
            n = min(win_len, pred_len - win_start)
            local = tokens[start + win_start : start + win_start + n + 1].to(torch.int64)
            x[row, :n], y[row, :n] = local[:-1], local[1:]
            scored_len[row] = n - offset
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            losses = forward_ttt(x, y, lora)
        for row, (start, _) in enumerate(batch):
            k = scored_len[row]
            if k == 0:
                continue
            part = slice(offset, offset + k)
            first = start + win_start + offset + 1
            positions = torch.arange(first, first + k)
            byte_counts = val_data.token_bytes(positions, x[row, part], y[row, part])
            tally.add(losses[row, part], byte_counts)
        trains = [ci < n - 1 for n in counts]
        if not any(trains) or time.perf_counter() > adapt_until:
            continue
        weight = torch.zeros(lora.bsz, device=device)
        weight[: len(batch)] = torch.tensor(trains, dtype=torch.float32, device=device)
        for _ in range(h.ttt_grad_steps):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses = forward_ttt(x, y, lora)
            loss = (losses[:, offset : offset + chunk].mean(dim=1) * weight).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def global_sgd_on_scored(h, device, tokens, base_model, start, end):
    """SGD of the base model on tokens[start:end], all of them targets that every rank has finished scoring."""
    params = [p for p in base_model.parameters()]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(params, lr=h.global_ttt_lr, momentum=h.global_ttt_momentum)
    chunk_starts = list(range(start, end - 1, h.global_ttt_chunk_tokens))
    base_model.train()
    for index, lo in enumerate(chunk_starts):
        hi = min(lo + h.global_ttt_chunk_tokens, end - 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * h.global_ttt_lr * (1.0 + math.cos(math.pi * index / len(chunk_starts)))
        optimizer.zero_grad(set_to_none=True)
        span = -(-(hi - lo) // h.world_size)
        a, b = lo + h.rank * span, min(lo + (h.rank + 1) * span, hi)
        if a < b:
            local = tokens[a : b + 1].to(torch.int64)
            cu = build_cu_seqlens(local[:-1], h.eval_seq_len).to(device)
            x, y = local[:-1].to(device)[None], local[1:].to(device)[None]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = base_model(x, y, cu, reduction="sum") / (hi - lo)
            loss.backward()
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if h.distributed:
                dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        torch.nn.utils.clip_grad_norm_(params, h.global_ttt_grad_clip)
        optimizer.step()
    base_model.eval()
    for p in params:
        p.requires_grad_(False)
        p.grad = None


def warm_up_ttt(h, device, base_model, forward_ttt):
    """Compiles the forward and backward of the adapters on random tokens; the adapters are thrown away."""
    lora = BatchedTTTLoRA(h.ttt_batch_size, base_model, h).to(device)
    gen = torch.Generator().manual_seed(0)
    for ci in (0, 1, 2):
        _, win_len, _ = chunk_window(ci, h.ttt_chunk_size, h.eval_seq_len)
        ids = torch.randint(0, h.vocab_size, (h.ttt_batch_size, win_len + 1), generator=gen).to(device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            forward_ttt(ids[:, :-1], ids[:, 1:], lora)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            forward_ttt(ids[:, :-1], ids[:, 1:], lora).mean().backward()
    del lora
    torch.cuda.empty_cache()


def eval_val_ttt_phased(h, device, val_data, base_model, eval_start):
    """Score-first TTT. In each phase all documents are scored with per-document adapters; after a phase of the prefix
    the base model takes SGD steps on that phase's documents, and the documents after it are scored with the result."""
    tokens = val_data.val_tokens
    docs = find_docs(tokens)
    bounds = phase_bounds(h, len(docs))
    adapt_until = eval_start + h.ttt_adapt_seconds
    base_model.eval()
    for p in base_model.parameters():
        p.requires_grad_(False)
    forward_ttt = torch.compile(base_model.forward_ttt, dynamic=True)
    warm_up_ttt(h, device, base_model, forward_ttt)
    log(f"ttt_phased: docs:{len(docs)} bounds:{bounds} warmup_done:{time.perf_counter() - eval_start:.1f}s")
    lora = BatchedTTTLoRA(h.ttt_batch_size, base_model, h).to(device)
    tally = ScoreTally(h, device)
    for phase, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:])):
        if lo == hi:
            continue
        phase_docs = docs[lo:hi]
        batches = build_doc_batches(phase_docs, h.ttt_batch_size)
        for batch in batches[h.rank :: h.world_size]:
            score_doc_batch(h, device, val_data, forward_ttt, lora, batch, tally, adapt_until)
        if h.distributed:
            dist.barrier()
        log(f"ttt_phase:{phase + 1}/{len(bounds) - 1} docs:{hi} time:{time.perf_counter() - eval_start:.1f}s")
        if phase < len(bounds) - 2:
            first, last = phase_docs[0], phase_docs[-1]
            global_sgd_on_scored(h, device, tokens, base_model, first[0], last[0] + last[1] + 1)
            log(f"ttt_global_sgd: phase:{phase + 1} tokens:{last[0] + last[1] - first[0]}")
    return tally.result(tokens.numel() - 1)


def timed_eval(label, fn, *args, **kwargs):
    torch.cuda.synchronize()
    start = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - start)
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms")
    return val_loss, val_bpb


# ---------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------


def train_model(h, device, val_data):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    optimizers = Optimizers(h, base_model)
    train_loader = DocumentPackingLoader(h, device)
    max_wallclock_ms = 1000.0 * h.max_wallclock_seconds
    train_cap_ms = max_wallclock_ms - 1000.0 * h.gptq_reserve_seconds
    log(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, training until {train_cap_ms:.0f}ms")

    def training_frac(step, elapsed_ms):
        return elapsed_ms / max(train_cap_ms, 1e-9) if train_cap_ms > 0 else step / max(h.iterations, 1)

    def lr_mul(frac):
        if h.warmdown_frac <= 0 or frac < 1.0 - h.warmdown_frac:
            return 1.0
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)

    def train_step(step, lr_scale):
        train_loss = torch.zeros((), device=device)
        for _ in range(h.grad_accum_steps):
            x, y, cu_seqlens = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled_model(x, y, cu_seqlens)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        optimizers.sync_grads()
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step(step, lr_scale)
        return train_loss / h.grad_accum_steps

    # compile both depths; weights, optimizer states and loader are put back afterwards
    if h.warmup_steps > 0:
        initial_model = {k: v.detach().clone() for k, v in base_model.state_dict().items()}
        initial_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers.all]
        for looping in (False, True):
            base_model.looping_active = looping
            for warmup_step in range(h.warmup_steps):
                train_step(warmup_step, 1.0)
            log(f"warmup looping:{looping} steps:{h.warmup_steps}")
        base_model.looping_active = False
        base_model.load_state_dict(initial_model)
        for opt, state in zip(optimizers.all, initial_states):
            opt.load_state_dict(state)
        optimizers.zero_grad()
        train_loader = DocumentPackingLoader(h, device)

    ema_state = {name: t.detach().float().clone() for name, t in base_model.state_dict().items()}
    training_time_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            log(f"stopping train_time:{training_time_ms:.0f}ms step:{step}/{h.iterations}")
            break
        if h.val_loss_every > 0 and step % h.val_loss_every == 0:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, compiled_model)
            log(f"{step}/{h.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{base_model.orders[True]}")
        train_loss = train_step(step, lr_mul(frac))
        with torch.no_grad():
            for name, t in base_model.state_dict().items():
                ema_state[name].mul_(h.ema_decay).add_(t.detach().float(), alpha=1.0 - h.ema_decay)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 5 or step % h.train_log_every == 0:
            log(f"{step}/{h.iterations} train_loss:{train_loss.item():.4f} train_time:{approx_ms / 60000:.1f}m")
        reached = approx_ms >= train_cap_ms > 0
        if h.distributed:
            flag = torch.tensor(int(reached), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached = bool(flag.item())
        if stop_after_step is None and reached:
            stop_after_step = step

    t0 = time.perf_counter()
    log("ema:applying EMA weights")
    current = base_model.state_dict()
    base_model.load_state_dict({name: t.to(current[name].dtype) for name, t in ema_state.items()})
    base_model.looping_active = h.num_loops > 0
    deadline = t0 + (max_wallclock_ms - training_time_ms) / 1000.0 - 2.0
    hessians, batches = collect_hessians(base_model, train_loader, h, device, deadline)
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log(f"gptq:{len(hessians)} hessians from {batches} batches, train+calibration {training_time_ms:.0f}ms")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    return base_model, compiled_model, hessians


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards:{len(glob.glob(h.train_files))} val_tokens:{val_data.val_tokens.numel()}")
    base_model, compiled_model, hessians = train_model(h, device, val_data)
    torch._dynamo.reset()
    serialize(h, base_model, hessians, device)
    del base_model, compiled_model, hessians
    torch.cuda.empty_cache()
    if h.distributed:
        dist.barrier()

    eval_start = time.perf_counter()
    eval_model = deserialize(h, device)
    eval_compiled = torch.compile(eval_model, dynamic=False, fullgraph=True)
    val_loss, val_bpb = timed_eval("quantized", eval_val, h, device, val_data, eval_compiled)
    if h.sliding_window_enabled:
        val_loss, val_bpb = timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model)
    if h.ttt_enabled:
        del eval_compiled
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        args = (h, device, val_data, eval_model, eval_start)
        val_loss, val_bpb = timed_eval("quantized_ttt_phased", eval_val_ttt_phased, *args)
    eval_seconds = time.perf_counter() - eval_start
    log(f"total_eval_time:{eval_seconds:.1f}s")
    if eval_seconds > h.max_eval_seconds:
        raise RuntimeError(f"evaluation took {eval_seconds:.1f}s, more than {h.max_eval_seconds:.0f}s")
    log(f"final val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")


def main():
    h = Hyperparameters()
    set_logging_hparams(h)
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    if h.world_size <= 0 or 8 % h.world_size != 0:
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
    torch._dynamo.config.cache_size_limit = 64
    if h.is_main_process:
        os.makedirs(h.artifact_dir or "logs", exist_ok=True)
        log("Hyperparameters:")
        for k, v in sorted(vars(type(h)).items()):
            if not k.startswith("_"):
                log(f"  {k}: {v}")
        log("=" * 100, console=False)
        log(Path(__file__).read_text(encoding="utf-8"), console=False)
        log(f"Running Python {re.sub(r'[ ]+', ' ', sys.version)}", console=False)
        log(f"Running PyTorch {torch.__version__}")
        log(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, text=True).stdout, console=False)
        log("=" * 100, console=False)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
