# sp8192 / 11L x 512 / depth recurrence / int6 GPTQ + int7 embeddings + lzma / per-document LoRA TTT with phased global SGD
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn_interface import flash_attn_func as flash_attn_3_func
from flash_attn_interface import flash_attn_varlen_func
from torch import Tensor, nn

BOS_ID = 1


# ----------------------------------------
# Hyperparameters
# ----------------------------------------


class Hyperparameters():
    # Experiment settings
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))

    # Training length
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.72))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

    # Validation / evals
    val_block_tokens = int(os.environ.get("VAL_BLOCK_TOKENS", 65536))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    sliding_window_enabled = bool(int(os.environ.get("SLIDING_WINDOW_ENABLED", "0")))
    sliding_batch_rows = int(os.environ.get("SLIDING_BATCH_ROWS", 32))

    # Model architecture
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    smear_window = int(os.environ.get("SMEAR_WINDOW", 12))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # Layer looping
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_start_layer = int(os.environ.get("PARALLEL_START_LAYER", 8))

    # Optimizer
    min_lr = float(os.environ.get("MIN_LR", 0.0))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_row_normalize = bool(int(os.environ.get("MUON_ROW_NORMALIZE", "1")))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))

    # Quantization & compression
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 15.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 16))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # Test-time training: one LoRA per document, reset for every batch of documents
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 64))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.0001))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 64))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_eval_seq_len = int(os.environ.get("TTT_EVAL_SEQ_LEN", 2048))
    ttt_grad_steps = int(os.environ.get("TTT_GRAD_STEPS", 1))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.0))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.999))
    ttt_weight_decay = float(os.environ.get("TTT_WEIGHT_DECAY", 0.5))
    ttt_time_guard_s = float(os.environ.get("TTT_TIME_GUARD_S", 540.0))

    # Phased TTT: after the first docs are scored, SGD of the whole model on them
    phased_ttt_prefix_docs = int(os.environ.get("PHASED_TTT_PREFIX_DOCS", 2000))
    phased_ttt_num_phases = int(os.environ.get("PHASED_TTT_NUM_PHASES", 2))
    global_ttt_lr = float(os.environ.get("GLOBAL_TTT_LR", 0.001))
    global_ttt_momentum = float(os.environ.get("GLOBAL_TTT_MOMENTUM", 0.9))
    global_ttt_epochs = int(os.environ.get("GLOBAL_TTT_EPOCHS", 1))
    global_ttt_block_tokens = int(os.environ.get("GLOBAL_TTT_BLOCK_TOKENS", 16384))
    global_ttt_grad_clip = float(os.environ.get("GLOBAL_TTT_GRAD_CLIP", 1.0))

    # Distributed
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # Paths
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}")
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_*.bin")
    tokenizer_path = os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_bpe.model")
    logfile = f"logs/{run_id}.txt"
    model_path = "final_model.pt"
    quantized_model_path = "final_model.int6.ptz"


# ----------------------------------------
# Logging
# ----------------------------------------

_logger_hparams = None


def set_logging_hparams(h):
    global _logger_hparams
    _logger_hparams = h


def log(msg, console=True):
    if _logger_hparams is None:
        print(msg)
        return
    if not _logger_hparams.is_main_process:
        return
    if console:
        print(msg, flush=True)
    if _logger_hparams.logfile is not None:
        with open(_logger_hparams.logfile, "a", encoding="utf-8") as f:
            print(msg, file=f)


# ----------------------------------------
# Data: shards, packed training stream, validation documents
# ----------------------------------------


def load_data_shard(file):
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.int32))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


def packed_layout(ids, max_len, pad_to=64):
    """cu_seqlens and in-document positions of a (rows, T) batch of token ids on the CPU.

    A segment starts at every row start and at every BOS, and documents longer than max_len are cut.
    cu_seqlens is padded with the total length (empty segments) so the compiled graph sees few shapes.
    """
    rows, width = ids.shape
    total = rows * width
    flat = ids.reshape(-1)
    starts = set((flat == BOS_ID).nonzero().flatten().tolist())
    starts.update(range(0, total, width))
    edges = sorted(starts) + [total]
    cuts = []
    for a, b in zip(edges[:-1], edges[1:]):
        cuts.extend(range(a, b, max_len))
    cuts.append(total)
    seg_starts = torch.tensor(cuts[:-1], dtype=torch.int64)
    seg_lens = torch.tensor(cuts, dtype=torch.int64).diff()
    pos = torch.arange(total) - seg_starts.repeat_interleave(seg_lens)
    padded = (len(cuts) + pad_to - 1) // pad_to * pad_to
    cu = torch.full((padded,), total, dtype=torch.int32)
    cu[: len(cuts)] = torch.tensor(cuts, dtype=torch.int32)
    return cu, pos.view(rows, width)


class TokenStream:
    """Reads the training shards one after another, forever."""

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


class DocumentPackingLoader:
    """Every rank walks the same stream and keeps its own span; documents are kept apart by cu_seqlens."""

    def __init__(self, h, device):
        self.h = h
        self.device = device
        self.stream = TokenStream(h.train_files)

    def next_batch(self, global_tokens, grad_accum_steps):
        local_tokens = global_tokens // (self.h.world_size * grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.h.world_size)
        local = chunk[self.h.rank * span : (self.h.rank + 1) * span].to(torch.int64)
        x = local[:-1].view(1, -1)
        y = local[1:].view(1, -1)
        cu, pos = packed_layout(x, self.h.train_seq_len)
        to = lambda t: t.pin_memory().to(self.device, non_blocking=True)
        return to(x), to(y), to(pos), to(cu)


@dataclass
class Doc:
    index: int
    start: int
    length: int  # tokens from its BOS up to and with the BOS of the next document

    @property
    def pred_len(self):
        return self.length - 1

    def num_chunks(self, chunk_size):
        return (self.pred_len + chunk_size - 1) // chunk_size


def find_docs(tokens):
    """Documents of the validation stream by their BOS. The BOS of the next document is the last target of a document."""
    n = tokens.numel()
    starts = (tokens == BOS_ID).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    docs = []
    for i, s in enumerate(starts):
        e = starts[i + 1] + 1 if i + 1 < len(starts) else n
        if e - s >= 2:
            docs.append(Doc(index=len(docs), start=s, length=e - s))
    assert sum(d.pred_len for d in docs) == n - 1, "documents do not cover the stream"
    return docs


def build_doc_batches(docs, batch_size):
    """Batches of similar length, the longest first so that the ranks finish at about the same time."""
    order = sorted(docs, key=lambda d: (-d.pred_len, d.index))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@dataclass
class ByteTables:
    """Bytes per target: its own, plus the space that its mark stands for unless a boundary token precedes."""

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

    def count(self, prev_ids, target_ids):
        nbytes = self.base_bytes[target_ids].to(torch.int32)
        nbytes = nbytes + (self.has_leading_space[target_ids] & ~self.is_boundary[prev_ids]).to(torch.int32)
        return nbytes


def build_byte_tables(sp, vocab_size, device):
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes = np.zeros(table_size, dtype=np.int16)
    has_leading_space = np.zeros(table_size, dtype=np.bool_)
    is_boundary = np.ones(table_size, dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary[token_id] = False
        if sp.is_byte(token_id):
            base_bytes[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("\u2581"):
            has_leading_space[token_id] = True
            piece = piece[1:]
        base_bytes[token_id] = len(piece.encode("utf-8"))
    return ByteTables(
        torch.tensor(base_bytes, device=device),
        torch.tensor(has_leading_space, device=device),
        torch.tensor(is_boundary, device=device),
    )


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} does not match tokenizer vocab_size={int(self.sp.vocab_size())}")
        self.val_tokens = load_validation_tokens(h.val_files)
        self.tables = build_byte_tables(self.sp, h.vocab_size, device)
        self.docs = find_docs(self.val_tokens)


# ----------------------------------------
# Model
# ----------------------------------------


class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights stay fp32, the matmul runs in the dtype of x."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self._zero_init = False

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, rope_dims, base, max_len):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        freqs = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        self.register_buffer("cos_table", freqs.cos(), persistent=False)
        self.register_buffer("sin_table", freqs.sin(), persistent=False)

    def forward(self, pos, dtype):
        cos = self.cos_table[pos][:, :, None, :].to(dtype)
        sin = self.sin_table[pos][:, :, None, :].to(dtype)
        return cos, sin


def apply_rotary_emb(x, cos, sin, rope_dims):
    x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = x_rope[..., :half], x_rope[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, x_pass), dim=-1)


class SmearGate(nn.Module):
    """Adds a gated share of the previous token's embedding. Never across a BOS: a document starts clean."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.gate = CastedLinear(window, 1)
        self.gate._zero_init = True
        self.smear_lambda = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x, ids):
        g = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.gate(x[:, 1:, : self.window]))
        inside = (ids[:, 1:] != BOS_ID).to(x.dtype).unsqueeze(-1)
        return torch.cat((x[:, :1], x[:, 1:] + g * inside * x[:, :-1]), dim=1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, qk_gain_init, rope_dims):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.rope_dims = rope_dims
        kv_dim = num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, kv_dim)
        self.c_v = CastedLinear(dim, kv_dim)
        self.proj = CastedLinear(dim, dim)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.use_xsa = False

    def _xsa(self, y, v):
        # take the part along the own value vector out of the output
        B, T, H, D = y.shape
        y_g = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x, rope, cu, max_len, q_lora=None, v_lora=None):
        B, T, D = x.shape
        q = self.c_q(x)
        v = self.c_v(x)
        if q_lora is not None:
            q = q + q_lora(x)
        if v_lora is not None:
            v = v + v_lora(x)
        q = q.view(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).view(B, T, self.num_kv_heads, self.head_dim)
        v = v.view(B, T, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (self.head_dim,))
        k = F.rms_norm(k, (self.head_dim,))
        cos, sin = rope
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if cu is None:
            y = flash_attn_3_func(q, k, v, causal=True)
        else:
            y = flash_attn_varlen_func(
                q.reshape(B * T, self.num_heads, self.head_dim),
                k.reshape(B * T, self.num_kv_heads, self.head_dim),
                v.reshape(B * T, self.num_kv_heads, self.head_dim),
                cu_seqlens_q=cu,
                cu_seqlens_k=cu,
                max_seqlen_q=max_len,
                max_seqlen_k=max_len,
                causal=True,
            ).view(B, T, self.num_heads, self.head_dim)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, dim, mlp_mult):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(h.model_dim, h.num_heads, h.num_kv_heads, h.qk_gain_init, h.rope_dims)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = 0 < h.parallel_start_layer <= layer_idx

    def forward(self, x, x0, rope, cu, max_len, q_lora=None, v_lora=None):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor, rope, cu, max_len, q_lora, v_lora)
        attn_out = self.attn_scale.to(x.dtype)[None, None, :] * attn_out
        mlp_scale = self.mlp_scale.to(x.dtype)[None, None, :]
        if self.parallel:
            return x_in + attn_out + mlp_scale * self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
        x_out = x_in + attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {h.logit_softcap}")
        self.logit_softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.smear_window)
        self.rotary = Rotary(h.rope_dims, h.rope_base, max(h.train_seq_len, h.eval_seq_len, h.ttt_eval_seq_len))
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.final_norm = RMSNorm()
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True

        # depth recurrence: blocks loop_start..loop_end run num_loops + 1 times once looping is on
        self.looping_active = False
        plain = list(range(h.num_layers))
        seg = list(range(h.loop_start, h.loop_end + 1))
        looped = plain[: h.loop_start] + seg * (h.num_loops + 1) + plain[h.loop_end + 1 :]
        if h.num_loops <= 0:
            looped = plain
        self.plan_plain = (plain[: len(plain) // 2], plain[len(plain) // 2 :])
        self.plan_looped = (looped[: len(looped) // 2], looped[len(looped) // 2 :])
        self.num_slots = len(looped)
        num_skips = max(min(len(e), len(d)) for e, d in (self.plan_plain, self.plan_looped))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim, dtype=torch.float32))
        self._init_weights(h)

    def _init_weights(self, h):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if module._zero_init:
                    nn.init.zeros_(module.weight)
                elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight, gain=1.0)

    def forward_hidden(self, ids, pos, cu, max_len, lora=None):
        x = self.tok_emb(ids).to(torch.bfloat16)
        x = self.smear(x, ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        rope = self.rotary(pos, x.dtype)
        enc, dec = self.plan_looped if self.looping_active else self.plan_plain
        skips = []
        slot = 0
        for i in enc:
            ql, vl = lora.at(slot) if lora is not None else (None, None)
            x = self.blocks[i](x, x0, rope, cu, max_len, ql, vl)
            skips.append(x)
            slot += 1
        for j, i in enumerate(dec):
            if skips:
                x = x + self.skip_weights[j].to(x.dtype)[None, None, :] * skips.pop()
            ql, vl = lora.at(slot) if lora is not None else (None, None)
            x = self.blocks[i](x, x0, rope, cu, max_len, ql, vl)
            slot += 1
        return self.final_norm(x)

    def project(self, hidden, lora=None):
        out = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        if lora is not None:
            out = out + lora.lm_head(hidden)
        return self.logit_softcap * torch.tanh(out.float() / self.logit_softcap)

    def token_losses(self, ids, targets, pos, cu, max_len):
        logits = self.project(self.forward_hidden(ids, pos, cu, max_len))
        losses = F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="none")
        return losses.view_as(targets)

    def forward(self, ids, targets, pos, cu, max_len):
        return self.token_losses(ids, targets, pos, cu, max_len).mean()

    def forward_chunk(self, ids, where, lora):
        """Logits at the positions `where` (rows, C) of the rows of `ids`, with one adapter per row."""
        pos = torch.arange(ids.size(1), device=ids.device).expand(ids.size(0), -1)
        hidden = self.forward_hidden(ids, pos, None, 0, lora)
        picked = hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        return self.project(picked, lora)


# ----------------------------------------
# LoRA for TTT
# ----------------------------------------


class BatchedLinearLoRA(nn.Module):
    """One rank-r adapter per row of the batch. B starts at zero, so a fresh adapter changes nothing."""

    def __init__(self, bsz, in_features, out_features, rank):
        super().__init__()
        self._bound = 1.0 / math.sqrt(in_features)
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features).uniform_(-self._bound, self._bound))
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))

    def reset(self):
        with torch.no_grad():
            self.A.uniform_(-self._bound, self._bound)
            self.B.zero_()

    def forward(self, x):
        return (x @ self.A.transpose(1, 2).to(x.dtype)) @ self.B.transpose(1, 2).to(x.dtype)


class BatchedTTTLoRA(nn.Module):
    def __init__(self, bsz, model, h):
        super().__init__()
        dim = h.model_dim
        kv_dim = h.num_kv_heads * (dim // h.num_heads)
        self.bsz = bsz
        self.lm_head = BatchedLinearLoRA(bsz, dim, h.vocab_size, h.ttt_lora_rank)
        self.q_loras = nn.ModuleList([BatchedLinearLoRA(bsz, dim, dim, h.ttt_lora_rank) for _ in range(model.num_slots)])
        self.v_loras = nn.ModuleList([BatchedLinearLoRA(bsz, dim, kv_dim, h.ttt_lora_rank) for _ in range(model.num_slots)])

    def at(self, slot):
        return self.q_loras[slot], self.v_loras[slot]

    def reset(self):
        with torch.no_grad():
            self.lm_head.reset()
            for loras in (self.q_loras, self.v_loras):
                for lora in loras:
                    lora.reset()


# ----------------------------------------
# Optimization
# ----------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5, eps=1e-7):
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16()
    X = X / (X.norm() + eps)
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0, row_normalize=False):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            updates = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
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
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    updates[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group["weight_decay"] > 0.0:
                    p.mul_(1.0 - lr * group["weight_decay"])
                g = updates[curr : curr + p.numel()].view_as(p).to(p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()


CONTROL_TENSOR_NAME_PATTERNS = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
)


class Optimizers:
    def __init__(self, h, model):
        block_named = list(model.blocks.named_parameters())
        self.matrix_params = [
            p for n, p in block_named if p.ndim == 2 and not any(c in n for c in CONTROL_TENSOR_NAME_PATTERNS)
        ]
        self.scalar_params = [
            p for n, p in block_named if p.ndim < 2 or any(c in n for c in CONTROL_TENSOR_NAME_PATTERNS)
        ]
        self.scalar_params += [model.skip_weights] + list(model.smear.parameters())
        self.adam_tok = torch.optim.AdamW(
            [{"params": [model.tok_emb.weight], "lr": h.tied_embed_lr, "base_lr": h.tied_embed_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.embed_wd,
            fused=True,
        )
        self.muon = Muon(
            self.matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.muon.param_groups:
            group["base_lr"] = h.matrix_lr
        self.adam_scalar = torch.optim.AdamW(
            [{"params": self.scalar_params, "lr": h.scalar_lr, "base_lr": h.scalar_lr}],
            betas=(h.beta1, h.beta2),
            eps=h.adam_eps,
            weight_decay=h.adam_wd,
            fused=True,
        )
        self.all = [self.adam_tok, self.muon, self.adam_scalar]
        self.params = [model.tok_emb.weight, *self.matrix_params, *self.scalar_params]

    def zero_grad(self):
        for opt in self.all:
            opt.zero_grad(set_to_none=True)

    def reduce_grads(self, h):
        if not h.distributed:
            return
        grads = [p.grad for p in self.params if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        for g, new in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
            g.copy_(new)

    def step(self, lr_scale, momentum):
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.all:
            opt.step()
        self.zero_grad()


class EMA:
    """fp32 running average of all weights, updated after every optimizer step."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {n: t.detach().float().clone() for n, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for n, t in model.state_dict().items():
            self.shadow[n].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model):
        own = model.state_dict()
        model.load_state_dict({n: t.to(own[n].dtype) for n, t in self.shadow.items()}, strict=True)


# ----------------------------------------
# Quantization
# ----------------------------------------


def collect_hessians(h, model, loader, device, deadline):
    """X^T X of every matrix' input over packed training batches; stops at the deadline of the training budget."""
    hessians = {}
    hooks = []

    def add(name, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), dtype=torch.float32, device=device)
        hessians[name].addmm_(x.T, x)

    def input_hook(name):
        return lambda module, inp, out: add(name, inp[0])

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            hooks.append(module.register_forward_hook(input_hook(name + ".weight")))
    # the embedding is also the output matrix: its input is what comes out of final_norm
    hooks.append(model.final_norm.register_forward_hook(lambda module, inp, out: add("tok_emb.weight", out)))

    model.eval()
    done = 0
    with torch.no_grad():
        for _ in range(h.gptq_calibration_batches):
            if time.perf_counter() >= deadline and done > 0:
                break
            x, _, pos, cu = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.forward_hidden(x, pos, cu, h.train_seq_len)
            torch.cuda.synchronize()
            done += 1
    for hook in hooks:
        hook.remove()
    count = torch.tensor(float(done), device=device)
    if h.distributed:
        dist.all_reduce(count, op=dist.ReduceOp.SUM)
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    return {name: (H / count).cpu() for name, H in hessians.items()}, int(count.item())


def gptq_quantize_weight(W, H, clip_sigmas, clip_range, block_size=128):
    W_orig = W.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = 0.01 * H.diag().mean()
    H.diagonal().add_(damp)
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_work = W_orig[:, perm].clone()
    W_work[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    row_std = W_orig.std(dim=1)
    s = (clip_sigmas * row_std / clip_range).clamp_min(1e-6).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=W_orig.device)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1, device=W_orig.device)
        for j in range(i2 - i1):
            w_col = W_block[:, j]
            d = Hinv_block[j, j]
            q_col = torch.clamp(torch.round(w_col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q_col.to(torch.int8)
            err = (w_col - q_col * sf) / d
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols:
            W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm], s


@dataclass
class QuantReport:
    """What became of the tensors, by kind; only for the log."""

    kinds: dict

    def add(self, kind, name):
        self.kinds[kind].add(".".join(p for p in name.split(".") if not p.isdigit()))

    def lines(self):
        yield "Quantized weights:"
        for kind in sorted(self.kinds):
            yield f"  {kind}: {', '.join(sorted(self.kinds[kind]))}"


def gptq_mixed_quantize(state_dict, hessians, h, device):
    result = {}
    meta = {}
    report = QuantReport(defaultdict(set))
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if name not in hessians:
            result[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = "passthrough"
            report.add("passthrough (float16)", name)
            continue
        embed = name == "tok_emb.weight"
        bits = h.embed_bits if embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(t.to(device), hessians[name].to(device), sigmas, 2 ** (bits - 1) - 1)
        result[name + ".q"] = q.cpu().contiguous()
        result[name + ".scale"] = s.cpu()
        meta[name] = f"gptq (int{bits})"
        report.add(f"gptq (int{bits})", name)
    for line in report.lines():
        log(line)
    return result, meta


def dequantize_mixed(result, meta, template):
    out = {}
    for name, like in template.items():
        if meta[name] == "passthrough":
            out[name] = result[name].to(like.dtype)
            continue
        q, s = result[name + ".q"], result[name + ".scale"]
        out[name] = (q.float() * s.float().view(q.size(0), 1)).to(like.dtype)
    return out


_BSHF_MAGIC = b"BSHF"


def _byte_shuffle(data, stride=2):
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.empty(len(src), dtype=np.uint8)
    dest = 0
    for p in range(stride):
        chunk = src[p::stride]
        out[dest : dest + len(chunk)] = chunk
        dest += len(chunk)
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()


def _byte_unshuffle(data):
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    n = len(payload)
    out = np.empty(n, dtype=np.uint8)
    src = 0
    for p in range(stride):
        k = n // stride + (1 if p < n % stride else 0)
        out[p::stride] = payload[src : src + k]
        src += k
    return out.tobytes()


def _compress(data):
    return lzma.compress(_byte_shuffle(data), preset=9 | lzma.PRESET_EXTREME)


def _decompress(blob):
    return _byte_unshuffle(lzma.decompress(blob))


def serialize(h, base_model, code, loader, deadline):
    """Full-precision checkpoint, GPTQ, lzma; returns (model bytes, total bytes)."""
    device = torch.device("cuda", h.local_rank)
    code_bytes = len(code.encode("utf-8"))
    log("GPTQ:collecting Hessians from calibration data...")
    t0 = time.perf_counter()
    hessians, n_batches = collect_hessians(h, base_model, loader, device, deadline)
    log(f"GPTQ:collected {len(hessians)} Hessians over {n_batches} batches in {time.perf_counter() - t0:.1f}s")
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log(f"Serialized model: {os.path.getsize(h.model_path)} bytes")
        log(f"Code size: {code_bytes} bytes")
    model_bytes = 0
    if h.is_main_process:
        sd_cpu = {k: v.detach().cpu() for k, v in base_model.state_dict().items()}
        quant_result, quant_meta = gptq_mixed_quantize(sd_cpu, hessians, h, device)
        buf = io.BytesIO()
        torch.save({"w": quant_result, "m": quant_meta}, buf)
        blob = _compress(buf.getvalue())
        with open(h.quantized_model_path, "wb") as f:
            f.write(blob)
        model_bytes = len(blob)
        total = model_bytes + code_bytes
        log(f"Serialized model quantized+lzma: {model_bytes} bytes")
        log(f"Total submission size quantized+lzma: {total} bytes")
        if total > h.size_limit:
            log(f"size: OVER the limit of {h.size_limit} by {total - h.size_limit} bytes")
    if h.distributed:
        dist.barrier()
    return model_bytes, model_bytes + code_bytes


def deserialize(h, device):
    """A fresh model, filled from the bytes on disk only."""
    model = GPT(h).to(device)
    with open(h.quantized_model_path, "rb") as f:
        blob = f.read()
    state = torch.load(io.BytesIO(_decompress(blob)), map_location="cpu", weights_only=True)
    template = {k: v.cpu() for k, v in model.state_dict().items()}
    model.load_state_dict(dequantize_mixed(state["w"], state["m"], template), strict=True)
    model.looping_active = h.num_loops > 0
    model.eval()
    return model


# ----------------------------------------
# Plain and sliding evaluation
# ----------------------------------------


@dataclass
class ScoreSums:
    """Sums of nats, of original bytes and of targets. float64, because 47 million terms come together."""

    loss: Tensor
    nbytes: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, device):
        return cls(*(torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)))

    def add(self, losses, nbytes, mask):
        """losses, nbytes, mask of one shape; where the mask is false nothing is counted."""
        m = mask.to(torch.float64)
        self.loss += (losses.detach().to(torch.float64) * m).sum()
        self.nbytes += (nbytes.to(torch.float64) * m).sum()
        self.tokens += m.sum()

    def reduced(self):
        out = ScoreSums(self.loss.clone(), self.nbytes.clone(), self.tokens.clone())
        if dist.is_available() and dist.is_initialized():
            for t in (out.loss, out.nbytes, out.tokens):
                dist.all_reduce(t, op=dist.ReduceOp.SUM)
        return out

    def merge(self, other):
        self.loss += other.loss
        self.nbytes += other.nbytes
        self.tokens += other.tokens

    def figures(self):
        val_loss = (self.loss / self.tokens.clamp_min(1)).item()
        val_bpb = (self.loss / math.log(2.0) / self.nbytes.clamp_min(1)).item()
        return val_loss, val_bpb


def eval_val(h, device, val_data, model):
    """Every target once, in blocks without overlap, documents apart; the fast figure for the log."""
    tokens = val_data.val_tokens
    n = tokens.numel() - 1
    sums = ScoreSums.zeros(device)
    n_blocks = (n + h.val_block_tokens - 1) // h.val_block_tokens
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for b in range(h.rank, n_blocks, h.world_size):
            s = b * h.val_block_tokens
            e = min(s + h.val_block_tokens, n)
            local = tokens[s : e + 1].to(torch.int64)
            x, y = local[:-1].view(1, -1), local[1:].view(1, -1)
            cu, pos = packed_layout(x, h.eval_seq_len)
            x, y, pos, cu = x.to(device), y.to(device), pos.to(device), cu.to(device)
            losses = model.token_losses(x, y, pos, cu, h.eval_seq_len)
            sums.add(losses, val_data.tables.count(x, y), torch.ones_like(y, dtype=torch.bool))
    model.train(was_training)
    return sums.reduced().figures()


def sliding_windows(n, seq_len, stride):
    """(start, end, first scored position) of windows over n targets; each target is scored in one window."""
    windows = [(0, min(seq_len, n), 0)]
    end = min(seq_len, n)
    while end < n:
        new_end = min(end + stride, n)
        start = max(0, new_end - seq_len)
        windows.append((start, new_end, end - start))
        end = new_end
    return windows


def eval_val_sliding(h, device, val_data, model):
    tokens = val_data.val_tokens
    n = tokens.numel() - 1
    windows = sliding_windows(n, h.eval_seq_len, h.eval_stride)
    mine = windows[len(windows) * h.rank // h.world_size : len(windows) * (h.rank + 1) // h.world_size]
    sums = ScoreSums.zeros(device)
    model.eval()
    with torch.no_grad():
        for i in range(0, len(mine), h.sliding_batch_rows):
            rows = mine[i : i + h.sliding_batch_rows]
            width = rows[0][1] - rows[0][0]  # all windows are of one length
            local = torch.stack([tokens[s : e + 1] for s, e, _ in rows]).to(torch.int64)
            x, y = local[:, :-1].contiguous(), local[:, 1:].contiguous()
            cu, pos = packed_layout(x, h.eval_seq_len)
            x, y, pos, cu = x.to(device), y.to(device), pos.to(device), cu.to(device)
            losses = model.token_losses(x, y, pos, cu, h.eval_seq_len)
            first = torch.tensor([f for _, _, f in rows], device=device)
            mask = torch.arange(width, device=device)[None, :] >= first[:, None]
            sums.add(losses, val_data.tables.count(x, y), mask)
    return sums.reduced().figures()


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{1000.0 * (time.perf_counter() - t0):.0f}ms")
    return val_loss, val_bpb


# ----------------------------------------
# Test-time training
# ----------------------------------------


@dataclass
class ChunkBatch:
    """Chunk ci of every document of a batch; rows whose document is over (or that are padding) are masked out."""

    ids: Tensor  # (B, W) the window: what stands before the last target of the chunk
    where: Tensor  # (B, C) position in the window whose logits predict the target
    targets: Tensor  # (B, C)
    prev: Tensor  # (B, C) the token before each target, for the byte count
    mask: Tensor  # (B, C) true where there is a target
    keep: Tensor  # (B,) 1.0 where the document goes on after this chunk


class DocBatch:
    def __init__(self, docs, bsz, chunk_size, device):
        pad = [0] * (bsz - len(docs))
        self.docs = docs
        self.chunk_size = chunk_size
        self.starts = torch.tensor([d.start for d in docs] + pad, device=device)
        self.preds = torch.tensor([d.pred_len for d in docs] + pad, device=device)
        self.num_chunks = (self.preds + chunk_size - 1) // chunk_size
        self.max_chunks = max(d.num_chunks(chunk_size) for d in docs)

    def chunk(self, tokens, ci, seq_len):
        n = tokens.numel()
        lo = ci * self.chunk_size
        width = min(lo + self.chunk_size, seq_len)
        active = ci < self.num_chunks
        end = torch.where(active, self.preds.clamp_max(lo + self.chunk_size), torch.zeros_like(self.preds))
        win = (end - seq_len).clamp_min(0)
        win_len = end - win
        chunk_len = (end - lo).clamp_min(0)

        col = torch.arange(width, device=tokens.device)[None, :]
        ids = tokens[(self.starts[:, None] + win[:, None] + col).clamp_max(n - 1)]
        ids = ids.masked_fill(col >= win_len[:, None], 0)

        at = torch.arange(self.chunk_size, device=tokens.device)[None, :]
        mask = at < chunk_len[:, None]
        where = (lo + at - win[:, None]).clamp(0, width - 1)
        src = (self.starts[:, None] + lo + at).clamp_max(n - 2)
        prev = tokens[src].masked_fill(~mask, 0)
        targets = tokens[src + 1].masked_fill(~mask, 0)
        keep = (ci + 1 < self.num_chunks).to(torch.float32)
        return ChunkBatch(ids, where, targets, prev, mask, keep)


def make_ttt_optimizer(h, lora):
    return torch.optim.AdamW(
        lora.parameters(),
        lr=h.ttt_lora_lr,
        betas=(h.ttt_beta1, h.ttt_beta2),
        eps=1e-10,
        weight_decay=h.ttt_weight_decay,
        fused=True,
    )


def chunk_losses(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def ttt_score_batch(h, fwd, lora, batch, tokens, tables, deadline):
    """Scores the documents of a batch chunk by chunk; a document's adapter learns a chunk once it is scored."""
    sums = ScoreSums.zeros(tokens.device)
    lora.reset()
    opt = make_ttt_optimizer(h, lora)
    for ci in range(batch.max_chunks):
        c = batch.chunk(tokens, ci, h.ttt_eval_seq_len)
        adapt = ci + 1 < batch.max_chunks and time.perf_counter() < deadline
        with torch.set_grad_enabled(adapt):
            logits = fwd(c.ids, c.where, lora)
            losses = chunk_losses(logits, c.targets)
        sums.add(losses, tables.count(c.prev, c.targets), c.mask)
        if not adapt:
            continue
        for step in range(h.ttt_grad_steps):
            if step > 0:
                losses = chunk_losses(fwd(c.ids, c.where, lora), c.targets)
            per_doc = (losses * c.mask).sum(dim=1) / batch.chunk_size
            opt.zero_grad(set_to_none=True)
            (per_doc * c.keep).sum().backward()
            opt.step()
    return sums


def warmup_ttt(h, fwd, model, device):
    """Compiles forward and backward of the TTT step on made-up tokens. The adapter of the warm-up is thrown away."""
    t0 = time.perf_counter()
    log("ttt_lora:warming up compile (random tokens, no val data)")
    gen = torch.Generator(device="cpu").manual_seed(h.seed)
    length = h.ttt_eval_seq_len + 2 * h.ttt_chunk_size + 2
    fake = torch.randint(2, h.vocab_size, (length,), generator=gen).to(device)
    batch = DocBatch([Doc(0, 0, length)], h.ttt_batch_size, h.ttt_chunk_size, device)
    lora = BatchedTTTLoRA(h.ttt_batch_size, model, h).to(device)
    opt = make_ttt_optimizer(h, lora)
    for ci in (0, 1, 2, h.ttt_eval_seq_len // (2 * h.ttt_chunk_size), batch.max_chunks - 1):
        c = batch.chunk(fake, ci, h.ttt_eval_seq_len)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                losses = chunk_losses(fwd(c.ids, c.where, lora), c.targets)
            if grad:
                opt.zero_grad(set_to_none=True)
                losses.sum().backward()
                opt.step()
    del lora, opt
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    log(f"ttt_lora:compile warmup done ({time.perf_counter() - t0:.1f}s)")


def global_sgd_on_scored(h, device, model, tokens, lo, hi, phase):
    """SGD of all weights on tokens[lo:hi], all of which every rank has scored. Gradients are summed over the ranks."""
    params = list(model.parameters())
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.global_ttt_lr, momentum=h.global_ttt_momentum)
    n = hi - lo - 1
    n_blocks = (n + h.global_ttt_block_tokens - 1) // h.global_ttt_block_tokens
    steps_per_epoch = (n_blocks + h.world_size - 1) // h.world_size
    total_steps = steps_per_epoch * h.global_ttt_epochs
    step = 0
    t0 = time.perf_counter()
    for epoch in range(h.global_ttt_epochs):
        for s in range(steps_per_epoch):
            for group in opt.param_groups:
                group["lr"] = h.global_ttt_lr * 0.5 * (1.0 + math.cos(math.pi * step / max(total_steps, 1)))
            opt.zero_grad(set_to_none=True)
            b = s * h.world_size + h.rank
            stats = torch.zeros(2, device=device)  # loss sum, targets
            if b < n_blocks:
                i0 = lo + b * h.global_ttt_block_tokens
                i1 = min(i0 + h.global_ttt_block_tokens, hi - 1)
                local = tokens[i0 : i1 + 1]
                x, y = local[:-1].view(1, -1), local[1:].view(1, -1)
                cu, pos = packed_layout(x.cpu(), h.eval_seq_len)
                loss = model.token_losses(x, y, pos.to(device), cu.to(device), h.eval_seq_len).sum()
                loss.backward()
                stats[0] = loss.detach()
                stats[1] = float(y.numel())
            if h.distributed:
                dist.all_reduce(stats, op=dist.ReduceOp.SUM)
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if h.distributed:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                p.grad.div_(stats[1])
            torch.nn.utils.clip_grad_norm_(params, h.global_ttt_grad_clip)
            opt.step()
            step += 1
            log(
                f"tttg: ph{phase} ep{epoch + 1}/{h.global_ttt_epochs} s{s + 1}/{steps_per_epoch} "
                f"loss:{(stats[0] / stats[1]).item():.4f} t:{time.perf_counter() - t0:.1f}s"
            )
    for p in params:
        p.grad = None
        p.requires_grad_(False)


def phase_bounds(num_docs, prefix_docs, num_phases):
    """Numbers of documents after which the whole model is updated."""
    prefix = min(prefix_docs, num_docs)
    if prefix <= 0 or num_phases <= 0:
        return []
    bounds = sorted({prefix * (i + 1) // num_phases for i in range(num_phases)})
    return [b for b in bounds if 0 < b < num_docs]


def eval_val_ttt_phased(h, device, val_data, model, eval_t0):
    tokens = val_data.val_tokens.to(device=device, dtype=torch.int64)
    docs = val_data.docs
    tables = val_data.tables
    deadline = eval_t0 + h.ttt_time_guard_s
    bounds = phase_bounds(len(docs), h.phased_ttt_prefix_docs, h.phased_ttt_num_phases)
    log(
        f"ttt_phased: total_docs:{len(docs)} prefix_docs:{bounds[-1] if bounds else 0} "
        f"suffix_docs:{len(docs) - (bounds[-1] if bounds else 0)} num_phases:{len(bounds)} boundaries:{bounds}"
    )
    for p in model.parameters():
        p.requires_grad_(False)
    fwd = torch.compile(model.forward_chunk, dynamic=True)
    warmup_ttt(h, fwd, model, device)

    lora = BatchedTTTLoRA(h.ttt_batch_size, model, h).to(device)
    log(f"ttt_lora:params:{sum(p.numel() for p in lora.parameters())} rank:{h.ttt_lora_rank} chunk:{h.ttt_chunk_size}")
    log("beginning TTT eval timer")
    total = ScoreSums.zeros(device)
    lo = 0
    for phase, hi in enumerate(bounds + [len(docs)]):
        batches = build_doc_batches(docs[lo:hi], h.ttt_batch_size)
        mine = range(h.rank, len(batches), h.world_size)
        running = ScoreSums.zeros(device)
        for k, bi in enumerate(mine):
            batch = DocBatch(batches[bi], h.ttt_batch_size, h.ttt_chunk_size, device)
            sums = ttt_score_batch(h, fwd, lora, batch, tokens, tables, deadline)
            running.merge(sums)
            if k % 10 == 0 or bi + h.world_size >= len(batches):
                bl, bb = sums.figures()
                rl, rb = running.figures()
                lens = [d.length for d in batches[bi]]
                log(
                    f"ttp: b{bi + 1}/{len(batches)} bl:{bl:.4f} bb:{bb:.4f} rl:{rl:.4f} rb:{rb:.4f} "
                    f"dl:{min(lens)}-{max(lens)} gd:{phase}"
                )
        total.merge(running.reduced())
        rl, rb = total.figures()
        log(f"ttpp: phase:{phase + 1}/{len(bounds) + 1} docs:{hi} loss:{rl:.6f} bpb:{rb:.6f} t:{time.perf_counter() - eval_t0:.1f}s")
        if hi < len(docs) and h.global_ttt_epochs > 0:
            first, last = docs[lo], docs[hi - 1]
            global_sgd_on_scored(h, device, model, tokens, first.start, last.start + last.length, phase)
        lo = hi
    log(f"ttt_phased: scored_tokens:{int(total.tokens.item())} bytes:{int(total.nbytes.item())}")
    return total.figures()


# ----------------------------------------
# Training
# ----------------------------------------


def train_model(h, device, val_data):
    """Returns the model (EMA weights), the loader and the seconds of the training clock."""
    base_model = GPT(h).to(device)
    compiled = torch.compile(base_model, dynamic=False, fullgraph=True)
    optimizers = Optimizers(h, base_model)
    loader = DocumentPackingLoader(h, device)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    log(f"world_size:{h.world_size} grad_accum_steps:{h.grad_accum_steps} seed:{h.seed}")

    max_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds) if h.max_wallclock_seconds > 0 else None
    if max_ms is not None:
        log(f"gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={max_ms:.0f}ms")

    def training_frac(step, elapsed_ms):
        return step / max(h.iterations, 1) if max_ms is None else elapsed_ms / max(max_ms, 1e-9)

    def lr_mul(frac):
        if h.warmdown_frac <= 0:
            return 1.0
        if frac >= 1.0 - h.warmdown_frac:
            return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def step_fn(step, lr_scale):
        train_loss = torch.zeros((), device=device)
        for _ in range(h.grad_accum_steps):
            x, y, pos, cu = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            loss = compiled(x, y, pos, cu, h.train_seq_len)
            train_loss += loss.detach()
            (loss / h.grad_accum_steps).backward()
        optimizers.reduce_grads(h)
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step(lr_scale, momentum)
        return train_loss / h.grad_accum_steps

    if h.warmup_steps > 0:
        # compile both plans, then put everything back as it was
        init_model = {n: t.detach().clone() for n, t in base_model.state_dict().items()}
        for looping in (False, True) if h.num_loops > 0 else (False,):
            base_model.looping_active = looping
            for w in range(h.warmup_steps):
                step_fn(w, 1.0)
                if w <= 5 or (w + 1) % 10 == 0 or w + 1 == h.warmup_steps:
                    log(f"{'loop_' if looping else ''}warmup_step: {w + 1}/{h.warmup_steps}")
        base_model.looping_active = False
        base_model.load_state_dict(init_model, strict=True)
        optimizers = Optimizers(h, base_model)
        loader = DocumentPackingLoader(h, device)

    ema = EMA(base_model, h.ema_decay)
    training_time_ms = 0.0
    elapsed_ms = 0.0
    stop_after_step = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        should_validate = last_step or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0)
        if should_validate:
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(f"stopping_early: wallclock_cap train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}")
            break
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} plan:{base_model.plan_looped}")
        train_loss = step_fn(step, lr_mul(frac))
        ema.update(base_model)
        step += 1

        # one clock for all ranks: the slowest
        clock = torch.tensor(training_time_ms + 1000.0 * (time.perf_counter() - t0), device=device, dtype=torch.float64)
        if h.distributed:
            dist.all_reduce(clock, op=dist.ReduceOp.MAX)
        elapsed_ms = clock.item()
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (elapsed_ms / 1000.0)
            log(
                f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} "
                f"train_time: {elapsed_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}"
            )
        if stop_after_step is None and max_ms is not None and elapsed_ms >= max_ms:
            stop_after_step = step

    log(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )
    t_ema = time.perf_counter()
    log("ema:applying EMA weights")
    ema.copy_to(base_model)
    base_model.looping_active = h.num_loops > 0
    torch.cuda.synchronize()
    return base_model, loader, training_time_ms / 1000.0 + (time.perf_counter() - t_ema)


def train_and_eval(h, device, code):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    val_data = ValidationData(h, device)
    log(f"train_shards: {len(list(Path(h.datasets_dir).resolve().glob('fineweb_train_*.bin')))}")
    log(f"val_tokens: {val_data.val_tokens.numel() - 1} val_docs: {len(val_data.docs)}")

    base_model, loader, train_seconds = train_model(h, device, val_data)
    # what is left of the training budget belongs to the Hessians
    deadline = time.perf_counter() + h.max_wallclock_seconds - train_seconds
    torch._dynamo.reset()
    serialize(h, base_model, code, loader, deadline)
    timed_eval("diagnostic pre-quantization post-ema", eval_val, h, device, val_data, base_model)
    del base_model, loader
    torch.cuda.empty_cache()

    if h.distributed:
        dist.barrier()
    eval_t0 = time.perf_counter()
    eval_model = deserialize(h, device)
    timed_eval("diagnostic quantized", eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled or not h.ttt_enabled:
        timed_eval("quantized_sliding_window", eval_val_sliding, h, device, val_data, eval_model)
    if h.ttt_enabled:
        # the figure of the record
        timed_eval("quantized_ttt_phased", eval_val_ttt_phased, h, device, val_data, eval_model, eval_t0)
    log(f"total_eval_time:{time.perf_counter() - eval_t0:.1f}s")


def log_environment(h, code):
    log(100 * "=", console=False)
    log("Hyperparameters:", console=True)
    for k, v in sorted(vars(type(h)).items()):
        if not k.startswith("_"):
            log(f"  {k}: {v}", console=True)
    log("=" * 100, console=False)
    log(code, console=False)
    log("=" * 100, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    smi = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    log(smi.stdout, console=False)
    log("=" * 100, console=False)


def main():
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    h = Hyperparameters()
    if h.world_size <= 0:
        raise ValueError(f"WORLD_SIZE must be positive, got {h.world_size}")
    if 8 % h.world_size != 0:
        raise ValueError(f"WORLD_SIZE={h.world_size} must divide 8 so grad_accum_steps stays integral")

    device = torch.device("cuda", h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = 32

    set_logging_hparams(h)
    code = Path(__file__).read_text(encoding="utf-8")
    if h.is_main_process:
        os.makedirs("logs", exist_ok=True)
        log_environment(h, code)
    train_and_eval(h, device, code)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
