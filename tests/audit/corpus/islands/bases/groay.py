import collections
import copy
import glob
import io
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
from torch import Tensor, nn
from flash_attn_interface import flash_attn_func as flash_attn_3_func

# ----------------------------------------
# Hyperparameters
# ----------------------------------------

class Hyperparameters():
    # Experiment
    data_dir = os.environ.get('DATA_DIR', './data/')
    seed = int(os.environ.get('SEED', 1337))
    run_id = os.environ.get('RUN_ID', str(uuid.uuid4()))

    # Training length
    iterations = int(os.environ.get('ITERATIONS', 20000))
    warmdown_frac = float(os.environ.get('WARMDOWN_FRAC', 0.72))
    warmup_steps = int(os.environ.get('WARMUP_STEPS', 20))
    train_batch_tokens = int(os.environ.get('TRAIN_BATCH_TOKENS', 2048 * 48 * 8))
    train_seq_len = int(os.environ.get('TRAIN_SEQ_LEN', 2048))
    train_log_every = int(os.environ.get('TRAIN_LOG_EVERY', 500))
    max_wallclock_seconds = float(os.environ.get('MAX_WALLCLOCK_SECONDS', 600.0))

    # Validation / evals
    val_batch_tokens = int(os.environ.get('VAL_BATCH_TOKENS', 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get('EVAL_SEQ_LEN', 2048))
    eval_stride = int(os.environ.get('EVAL_STRIDE', 64))
    eval_batch_seqs = int(os.environ.get('EVAL_BATCH_SEQS', 32))
    val_loss_every = int(os.environ.get('VAL_LOSS_EVERY', 4000))
    sliding_window_enabled = bool(int(os.environ.get('SLIDING_WINDOW_ENABLED', '1')))

    # Test-time training
    ttt_enabled = bool(int(os.environ.get('TTT_ENABLED', '1')))
    ttt_lr = float(os.environ.get('TTT_LR', 0.005))
    ttt_epochs = int(os.environ.get('TTT_EPOCHS', 3))
    ttt_momentum = float(os.environ.get('TTT_MOMENTUM', 0.9))
    ttt_chunk_tokens = int(os.environ.get('TTT_CHUNK_TOKENS', 32768))
    ttt_batch_seqs = int(os.environ.get('TTT_BATCH_SEQS', 16))
    ttt_grad_clip = float(os.environ.get('TTT_GRAD_CLIP', 1.0))

    # Model architecture
    vocab_size = int(os.environ.get('VOCAB_SIZE', 8192))
    num_layers = int(os.environ.get('NUM_LAYERS', 11))
    xsa_last_n = int(os.environ.get('XSA_LAST_N', 11))
    model_dim = int(os.environ.get('MODEL_DIM', 512))
    num_heads = int(os.environ.get('NUM_HEADS', 8))
    num_kv_heads = int(os.environ.get('NUM_KV_HEADS', 4))
    mlp_mult = float(os.environ.get('MLP_MULT', 4.0))
    skip_gates_enabled = bool(int(os.environ.get('SKIP_GATES_ENABLED', '1')))
    tie_embeddings = bool(int(os.environ.get('TIE_EMBEDDINGS', '1')))
    logit_softcap = float(os.environ.get('LOGIT_SOFTCAP', 30.0))
    rope_base = float(os.environ.get('ROPE_BASE', 10000.0))
    rope_dims = int(os.environ.get('ROPE_DIMS', 16))
    qk_gain_init = float(os.environ.get('QK_GAIN_INIT', 5.0))
    ln_scale = bool(int(os.environ.get('LN_SCALE', '1')))

    # Parallel residual lanes: from this physical layer on attention and MLP live on lanes of their own
    parallel_start_layer = int(os.environ.get('PARALLEL_START_LAYER', 7))

    # Depth recurrence
    num_loops = int(os.environ.get('NUM_LOOPS', 2))
    loop_start = int(os.environ.get('LOOP_START', 3))
    loop_end = int(os.environ.get('LOOP_END', 5))
    enable_looping_at = float(os.environ.get('ENABLE_LOOPING_AT', 0.35))

    # Optimizer
    min_lr = float(os.environ.get('MIN_LR', 0.0))
    tied_embed_lr = float(os.environ.get('TIED_EMBED_LR', 0.03))
    tied_embed_init_std = float(os.environ.get('TIED_EMBED_INIT_STD', 0.005))
    head_lr = float(os.environ.get('HEAD_LR', 0.008))
    matrix_lr = float(os.environ.get('MATRIX_LR', 0.022))
    scalar_lr = float(os.environ.get('SCALAR_LR', 0.02))
    muon_momentum = float(os.environ.get('MUON_MOMENTUM', 0.99))
    muon_backend_steps = int(os.environ.get('MUON_BACKEND_STEPS', 5))
    muon_momentum_warmup_start = float(os.environ.get('MUON_MOMENTUM_WARMUP_START', 0.92))
    muon_momentum_warmup_steps = int(os.environ.get('MUON_MOMENTUM_WARMUP_STEPS', 1500))
    muon_row_normalize = bool(int(os.environ.get('MUON_ROW_NORMALIZE', '1')))
    muon_wd = float(os.environ.get('MUON_WD', 0.095))
    embed_wd = float(os.environ.get('EMBED_WD', 0.085))
    adam_wd = float(os.environ.get('ADAM_WD', 0.02))
    beta1 = float(os.environ.get('BETA1', 0.9))
    beta2 = float(os.environ.get('BETA2', 0.95))
    adam_eps = float(os.environ.get('ADAM_EPS', 1e-8))
    grad_clip_norm = float(os.environ.get('GRAD_CLIP_NORM', 0.3))
    ema_decay = float(os.environ.get('EMA_DECAY', 0.9965))

    # Quantization & compression
    gptq_calibration_batches = int(os.environ.get('GPTQ_CALIBRATION_BATCHES', 64))
    gptq_reserve_seconds = float(os.environ.get('GPTQ_RESERVE_SECONDS', 13.0))
    matrix_bits = int(os.environ.get('MATRIX_BITS', 6))
    embed_bits = int(os.environ.get('EMBED_BITS', 8))
    matrix_clip_sigmas = float(os.environ.get('MATRIX_CLIP_SIGMAS', 12.85))
    embed_clip_sigmas = float(os.environ.get('EMBED_CLIP_SIGMAS', 20.0))
    gptq_block_size = int(os.environ.get('GPTQ_BLOCK_SIZE', 128))
    gptq_damp = float(os.environ.get('GPTQ_DAMP', 0.01))
    size_limit = int(os.environ.get('SIZE_LIMIT', 16_000_000))

    # Distributed
    distributed = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
    rank, world_size = int(os.environ.get('RANK', '0')), int(os.environ.get('WORLD_SIZE', '1'))
    local_rank = int(os.environ.get('LOCAL_RANK', '0'))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size

    # Data paths
    datasets_dir = os.path.join(data_dir, 'datasets', f'fineweb10B_sp{vocab_size}')
    train_files = os.path.join(datasets_dir, 'fineweb_train_*.bin')
    val_files = os.path.join(datasets_dir, 'fineweb_val_*.bin')
    tokenizer_path = os.path.join(data_dir, 'tokenizers', f'fineweb_{vocab_size}_bpe.model')

    # Files written
    logfile = f'logs/{run_id}.txt'
    model_path = 'final_model.pt'
    quantized_model_path = 'final_model.int6.ptz'

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
    if not _logger_hparams.is_main_process: return
    if console: print(msg, flush=True)
    if _logger_hparams.logfile is not None:
        with open(_logger_hparams.logfile, 'a', encoding='utf-8') as f: print(msg, file=f)

# ----------------------------------------
# Data
# ----------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * np.dtype('<i4').itemsize
_SHARD_NTOKENS_CACHE = {}
_MMAP_CACHE = {}

def _read_num_tokens(file):
    key = str(file)
    if key in _SHARD_NTOKENS_CACHE: return _SHARD_NTOKENS_CACHE[key]
    header = np.fromfile(file, dtype='<i4', count=SHARD_HEADER_INTS)
    if header.size != SHARD_HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f'Unexpected shard header for {file}')
    n = int(header[2])
    _SHARD_NTOKENS_CACHE[key] = n
    return n

def _get_shard_memmap(file):
    key = str(file)
    mm = _MMAP_CACHE.get(key)
    if mm is None:
        mm = np.memmap(file, mode='r', dtype='<u2', offset=SHARD_HEADER_BYTES, shape=(_read_num_tokens(file),))
        _MMAP_CACHE[key] = mm
    return mm

def load_data_shard(file):
    n = _read_num_tokens(file)
    expected = SHARD_HEADER_BYTES + n * np.dtype('<u2').itemsize
    if Path(file).stat().st_size != expected:
        raise ValueError(f'Shard size mismatch for {file}: expected {expected} bytes')
    tokens = np.fromfile(file, dtype='<u2', count=n, offset=SHARD_HEADER_BYTES)
    if tokens.size != n: raise ValueError(f'Short read for {file}')
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))

def load_validation_tokens(pattern, seq_len):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files: raise FileNotFoundError(f'No files found for pattern: {pattern}')
    # The export pads nothing: the shards together are exactly the fixed first 50k documents.
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() <= seq_len: raise ValueError(f'Validation split is too short for seq_len={seq_len}')
    return tokens

def build_sentencepiece_luts(sp, vocab_size, device):
    sp_vocab_size = int(sp.vocab_size())
    assert sp.piece_to_id('▁') != sp.unk_id(), "Tokenizer must have '▁' (space) as its own token"
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_token_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id): continue
        is_boundary_token_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith('▁'):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode('utf-8'))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )

class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f'VOCAB_SIZE={h.vocab_size} does not match tokenizer vocab_size={int(self.sp.vocab_size())}')
        self.val_tokens = load_validation_tokens(h.val_files, h.eval_seq_len)
        luts = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_token_lut = luts

    def byte_counts(self, prev_ids, tgt_ids):
        counts = self.base_bytes_lut[tgt_ids].to(torch.float64)
        # a space in front of the piece is text only if something stands in front of the space
        spaced = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        return counts + spaced.to(torch.float64)

class ShuffledSequenceLoader:
    """Every shard is cut into train_seq_len pieces at a random phase; pieces are drawn without replacement, and the
    shard for each draw is picked with probability proportional to the pieces that it still has."""

    def __init__(self, h, device):
        self.world_size, self.rank, self.device = h.world_size, h.rank, device
        self.seq_len = h.train_seq_len
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files: raise FileNotFoundError(f'No files found for pattern: {h.train_files}')
        self.files = all_files[h.rank :: h.world_size]
        self.rng = np.random.Generator(np.random.PCG64(h.seed * 1000 + h.rank))
        self.num_tokens = [_read_num_tokens(f) for f in self.files]
        self.start_inds = [[] for _ in self.files]
        for si in range(len(self.files)): self._reset_shard(si)

    def _reset_shard(self, si):
        max_phase = min(self.seq_len - 1, max(0, self.num_tokens[si] - self.seq_len - 1))
        phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
        num_sequences = (self.num_tokens[si] - 1 - phase) // self.seq_len
        order = self.rng.permutation(num_sequences)
        self.start_inds[si] = (phase + order * self.seq_len).tolist()

    def next_batch(self, global_tokens, grad_accum_steps):
        device_tokens = global_tokens // (self.world_size * grad_accum_steps)
        device_batch = device_tokens // self.seq_len
        remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
        x = torch.empty((device_batch, self.seq_len), dtype=torch.int64)
        y = torch.empty((device_batch, self.seq_len), dtype=torch.int64)
        for bi in range(device_batch):
            total = remaining.sum()
            if total <= 0:
                for si in range(len(self.files)): self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            mm = _get_shard_memmap(self.files[si])
            window = torch.as_tensor(np.array(mm[start : start + self.seq_len + 1], dtype=np.int64))
            x[bi], y[bi] = window[:-1], window[1:]
        return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)

# ----------------------------------------
# Model
# ----------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x): return F.rms_norm(x, (x.size(-1),), eps=self.eps)

class CastedLinear(nn.Linear):
    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)

class Rotary(nn.Module):
    def __init__(self, dim, base=10000.0, train_seq_len=1024, rope_dims=0):
        super().__init__()
        self.dim, self.base, self.train_seq_len = dim, base, train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        inv_freq = 1.0 / (base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims))
        self.register_buffer('inv_freq', inv_freq, persistent=False)
        self._seq_len_cached, self._cos_cached, self._sin_cached = 0, None, None

    def forward(self, seq_len, device, dtype):
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            inv_freq = self.inv_freq.to(device)
            if seq_len > self.train_seq_len:
                rd, scale = self.rope_dims, seq_len / self.train_seq_len
                new_base = self.base * scale ** (rd / (rd - 2))
                inv_freq = 1.0 / (new_base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd))
            t = torch.arange(seq_len, device=device, dtype=inv_freq.dtype)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached, self._sin_cached = freqs.cos()[None, :, None, :], freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)

def apply_rotary_emb(x, cos, sin, rope_dims=0):
    if 0 < rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)

class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len):
        super().__init__()
        if dim % num_heads != 0: raise ValueError('model_dim must be divisible by num_heads')
        if num_heads % num_kv_heads != 0: raise ValueError('num_heads must be divisible by num_kv_heads')
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        if self.head_dim % 2 != 0: raise ValueError('head_dim must be even for RoPE')
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rope_dims, self.use_xsa = 0, False
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len)

    def _xsa(self, y, v):
        # exclusive self attention: take out of every head what points along the token's own value
        B, T, H, D = y.shape
        Hkv = v.size(-2)
        y_g = y.reshape(B, T, Hkv, H // Hkv, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (y_g - (y_g * vn).sum(dim=-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x):
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q, k = apply_rotary_emb(q, cos, sin, self.rope_dims), apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa: y = self._xsa(y, v)
        return self.proj(y.reshape(bsz, seqlen, dim))

class MLP(nn.Module):
    def __init__(self, dim, mlp_mult):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc, self.proj = CastedLinear(dim, hidden, bias=False), CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x): return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())

class Block(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init, train_seq_len, layer_idx=0, ln_scale=False):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if ln_scale else 1.0

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(self.attn_norm(x) * self.ln_scale_factor)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.ln_scale_factor)

    def forward_lanes(self, lane_a, lane_m, x0, cross):
        # attention reads lane_a, the MLP lane_m; each writes to both through the 2x2 matrix `cross`
        mix = self.resid_mix.to(dtype=lane_a.dtype)
        cross = cross.to(dtype=lane_a.dtype)
        read_a = mix[0][None, None, :] * lane_a + mix[1][None, None, :] * x0
        a = self.attn_scale.to(dtype=lane_a.dtype)[None, None, :] * self.attn(self.attn_norm(read_a) * self.ln_scale_factor)
        m = self.mlp_scale.to(dtype=lane_m.dtype)[None, None, :] * self.mlp(self.mlp_norm(lane_m) * self.ln_scale_factor)
        return read_a + cross[0, 0] * a + cross[0, 1] * m, lane_m + cross[1, 0] * a + cross[1, 1] * m

class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0: raise ValueError(f'logit_softcap must be positive, got {h.logit_softcap}')
        self.tie_embeddings, self.tied_embed_init_std = h.tie_embeddings, h.tied_embed_init_std
        self.logit_softcap, self.num_layers = h.logit_softcap, h.num_layers
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList([
            Block(h.model_dim, h.num_heads, h.num_kv_heads, h.mlp_mult, h.rope_base, h.qk_gain_init, h.train_seq_len,
                  layer_idx=i, ln_scale=h.ln_scale)
            for i in range(h.num_layers)
        ])
        head_dim = h.model_dim // h.num_heads
        for i, block in enumerate(self.blocks):
            if h.rope_dims > 0:
                block.attn.rope_dims = h.rope_dims
                block.attn.rotary = Rotary(head_dim, base=h.rope_base, train_seq_len=h.train_seq_len, rope_dims=h.rope_dims)
            block.attn.use_xsa = i >= h.num_layers - h.xsa_last_n
        self.final_norm = RMSNorm()
        self.lm_head = None if h.tie_embeddings else CastedLinear(h.model_dim, h.vocab_size, bias=False)
        if self.lm_head is not None: self.lm_head._zero_init = True

        # Which physical layer runs at each virtual depth, with the loop on and off
        self.looping_active = False
        if h.num_loops > 0:
            loop_seg = list(range(h.loop_start, h.loop_end + 1))
            all_indices = list(range(h.loop_start))
            for _ in range(h.num_loops + 1): all_indices.extend(loop_seg)
            all_indices.extend(range(h.loop_end + 1, h.num_layers))
        else:
            all_indices = list(range(h.num_layers))
        half, plain_half = len(all_indices) // 2, h.num_layers // 2
        self.loop_encoder, self.loop_decoder = all_indices[:half], all_indices[half:]
        self.plain_encoder, self.plain_decoder = list(range(plain_half)), list(range(plain_half, h.num_layers))

        self.num_skip_weights = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32)) if h.skip_gates_enabled else None

        self.parallel_start_layer = h.parallel_start_layer
        num_parallel = max(0, h.num_layers - h.parallel_start_layer)
        self.lane_cross = nn.Parameter(torch.ones(max(1, num_parallel), 2, 2, dtype=torch.float32))
        self.lane_merge = nn.Parameter(torch.full((2,), 0.5, dtype=torch.float32))
        self._init_weights()

    def _init_weights(self):
        if self.tie_embeddings: nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear): continue
            if getattr(module, '_zero_init', False): nn.init.zeros_(module.weight)
            elif module.weight.ndim == 2 and min(module.weight.shape) >= 64: nn.init.orthogonal_(module.weight, gain=1.0)

    def _skip(self, x, skip, i):
        scaled = self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skip
        if self.skip_gates is None: return x + scaled
        g = torch.sigmoid(self.skip_gates[i].to(dtype=x.dtype))[None, None, :]
        return torch.lerp(scaled, x, g)

    def forward_hidden(self, input_ids):
        x = F.rms_norm(self.tok_emb(input_ids), (self.tok_emb.weight.size(-1),))
        x0, skips = x, []
        enc, dec = (self.loop_encoder, self.loop_decoder) if self.looping_active else (self.plain_encoder, self.plain_decoder)
        for i in enc:
            x = self.blocks[i](x, x0)
            skips.append(x)
        lane_m = None
        for skip_idx, i in enumerate(dec):
            if skip_idx < self.num_skip_weights and skips:
                skip = skips.pop()
                x = self._skip(x, skip, skip_idx)
                if lane_m is not None: lane_m = self._skip(lane_m, skip, skip_idx)
            if i < self.parallel_start_layer:
                x = self.blocks[i](x, x0)
                continue
            if lane_m is None: lane_m = x
            x, lane_m = self.blocks[i].forward_lanes(x, lane_m, x0, self.lane_cross[i - self.parallel_start_layer])
        if lane_m is not None:
            w = self.lane_merge.to(dtype=x.dtype)
            x = w[0] * x + w[1] * lane_m
        return self.final_norm(x)

    def forward_logits(self, input_ids):
        x = self.forward_hidden(input_ids)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.tie_embeddings else self.lm_head(x)
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction='mean')

def classify_param(name):
    if 'tok_emb' in name or 'lm_head' in name: return 'embed'
    if '.mlp.' in name: return 'mlp'
    if '.attn.' in name: return 'attn'
    return 'other'

# ----------------------------------------
# Optimization
# ----------------------------------------

@torch.compile
def zeropower_via_newtonschulz5(G, steps=10, eps=1e-7):
    a, b, c = (3.4445, -4.7750, 2.0315)
    X = G.bfloat16()
    X /= X.norm() + eps
    transposed = G.size(0) > G.size(1)
    if transposed: X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X

class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, nesterov=nesterov,
                                      weight_decay=weight_decay, row_normalize=row_normalize))

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        for group in self.param_groups:
            params = group['params']
            if not params: continue
            lr, momentum, nesterov, wd = group['lr'], group['momentum'], group['nesterov'], group['weight_decay']
            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g, state = p.grad, self.state[p]
                    if 'momentum_buffer' not in state: state['momentum_buffer'] = torch.zeros_like(g)
                    buf = state['momentum_buffer']
                    buf.mul_(momentum).add_(g)
                    if nesterov: g = g.add(buf, alpha=momentum)
                    if group['row_normalize']:
                        g = g / g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group['backend_steps'])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed: dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if wd > 0.0: p.data.mul_(1.0 - lr * wd)
                p.add_(updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype), alpha=-lr)
                curr += p.numel()

CONTROL_TENSOR_NAME_PATTERNS = ('attn_scale', 'mlp_scale', 'resid_mix', 'q_gain', 'skip_weights', 'skip_gates', 'lane_cross', 'lane_merge')

class Optimizers():
    def __init__(self, h, base_model):
        block_named_params = list(base_model.blocks.named_parameters())
        is_control = lambda name: any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
        matrix_params = [p for name, p in block_named_params if p.ndim == 2 and not is_control(name)]
        scalar_params = [p for name, p in block_named_params if p.ndim < 2 or is_control(name)]
        scalar_params += [base_model.skip_weights, base_model.lane_cross, base_model.lane_merge]
        if base_model.skip_gates is not None: scalar_params.append(base_model.skip_gates)
        betas = (h.beta1, h.beta2)
        self.optimizer_tok = torch.optim.AdamW(
            [{'params': [base_model.tok_emb.weight], 'lr': h.tied_embed_lr, 'base_lr': h.tied_embed_lr}],
            betas=betas, eps=h.adam_eps, weight_decay=h.embed_wd, fused=True)
        self.optimizer_muon = Muon(matrix_params, lr=h.matrix_lr, momentum=h.muon_momentum, backend_steps=h.muon_backend_steps,
                                   weight_decay=h.muon_wd, row_normalize=h.muon_row_normalize)
        for group in self.optimizer_muon.param_groups: group['base_lr'] = h.matrix_lr
        self.optimizer_scalar = torch.optim.AdamW(
            [{'params': scalar_params, 'lr': h.scalar_lr, 'base_lr': h.scalar_lr}],
            betas=betas, eps=h.adam_eps, weight_decay=h.adam_wd, fused=True)
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]
        self.replicated = [base_model.tok_emb.weight, *matrix_params, *scalar_params]
        if base_model.lm_head is not None:
            self.optimizers.append(torch.optim.Adam(
                [{'params': [base_model.lm_head.weight], 'lr': h.head_lr, 'base_lr': h.head_lr}],
                betas=betas, eps=h.adam_eps, fused=True))
            self.replicated.append(base_model.lm_head.weight)

    def __iter__(self): return iter(self.optimizers)

    def zero_grad_all(self):
        for opt in self.optimizers: opt.zero_grad(set_to_none=True)

    def step(self):
        for opt in self.optimizers: opt.step()
        self.zero_grad_all()

    def set_lr(self, scale, muon_momentum):
        for group in self.optimizer_muon.param_groups: group['momentum'] = muon_momentum
        for opt in self.optimizers:
            for group in opt.param_groups: group['lr'] = group['base_lr'] * scale

def restore_fp32_params(model):
    for module in model.modules():
        if isinstance(module, CastedLinear): module.float()
    for name, param in model.named_parameters():
        if (param.ndim < 2 or any(p in name for p in CONTROL_TENSOR_NAME_PATTERNS)) and param.dtype != torch.float32:
            param.data = param.data.float()

class WeightEMA:
    """Exponential average of the whole state dict in fp32, updated after every step."""

    def __init__(self, model, decay):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model):
        current = model.state_dict()
        model.load_state_dict({name: t.to(dtype=current[name].dtype) for name, t in self.shadow.items()}, strict=True)

# ----------------------------------------
# Quantization
# ----------------------------------------

def collect_hessians(model, train_loader, h, device, n_batches):
    """Input second moments of every matrix, summed over ranks. Reads training batches only."""
    hessians, hooks = {}, []

    def make_hook(name, on_output=False):
        def hook_fn(module, inp, out):
            x = (out if on_output else inp[0]).detach().float()
            if x.ndim == 3: x = x.reshape(-1, x.shape[-1])
            if name not in hessians:
                hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
            hessians[name].addmm_(x.T, x)
        return hook_fn

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(make_hook(name + '.weight')))
    if model.tie_embeddings:
        # the tied head multiplies what the final norm puts out
        hooks.append(model.final_norm.register_forward_hook(make_hook('tok_emb.weight', on_output=True)))
    model.eval()
    with torch.no_grad(), torch.autocast(device_type='cuda', dtype=torch.bfloat16):
        for _ in range(n_batches):
            x, _ = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            model.forward_logits(x[: h.eval_batch_seqs])
    for hook in hooks: hook.remove()
    for name in sorted(hessians):
        if h.distributed: dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
        hessians[name] = (hessians[name] / (n_batches * h.world_size)).cpu()
    return hessians

def row_scales(W, clip_sigmas, clip_range):
    # SDClip: the largest code stands for clip_sigmas standard deviations of the row
    return (clip_sigmas * W.std(dim=1) / clip_range).clamp_min(1e-10).to(torch.float16)

def gptq_quantize_weight(w, H, clip_sigmas, clip_range, block_size, damp):
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    s = row_scales(W_orig, clip_sigmas, clip_range)
    sf = s.float()
    Q, W_work = torch.zeros(rows, cols, dtype=torch.int8), W_perm.clone()
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block, Hinv_block = W_work[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1)
        for j in range(i2 - i1):
            w_col, d = W_block[:, j], Hinv_block[j, j]
            q_col = torch.clamp(torch.round(w_col / sf), -clip_range, clip_range)
            Q[:, i1 + j] = q_col.to(torch.int8)
            err = (w_col - q_col * sf) / d
            Err[:, j] = err
            W_block[:, j:] -= err.unsqueeze(1) * Hinv_block[j, j:].unsqueeze(0)
        if i2 < cols: W_work[:, i2:] -= Err @ Hinv[i1:i2, i2:]
    return Q[:, invperm], s

def gptq_mixed_quantize(state_dict, hessians, h):
    result, meta, err_sum, err_n = {}, {}, 0.0, 0
    for name, tensor in state_dict.items():
        t = tensor.detach().cpu().contiguous()
        if not t.is_floating_point() or t.numel() <= 65536:
            result[name] = t.to(torch.float16) if t.is_floating_point() else t
            meta[name] = 'passthrough (float16)'
            continue
        is_embed = classify_param(name) == 'embed'
        bits, sigmas = (h.embed_bits, h.embed_clip_sigmas) if is_embed else (h.matrix_bits, h.matrix_clip_sigmas)
        clip_range = 2 ** (bits - 1) - 1
        q, s = gptq_quantize_weight(t, hessians[name], sigmas, clip_range, h.gptq_block_size, h.gptq_damp)
        err_sum, err_n = err_sum + float((q.float() * s.float()[:, None] - t.float()).square().sum()), err_n + t.numel()
        result[name + '.q'], result[name + '.scale'] = q, s
        meta[name] = f'gptq (int{bits})'
    groups = collections.defaultdict(list)
    for name, kind in meta.items(): groups[kind].append(re.sub(r'\.\d+\.', '.', name))
    log('Quantized weights:')
    for kind in sorted(groups): log(f"  {kind}: {', '.join(sorted(set(groups[kind])))}")
    log(f'  rms error of the quantized weights: {math.sqrt(err_sum / max(err_n, 1)):.6f}')
    return result, meta

def dequantize_mixed(result, meta, template_sd):
    out = {}
    for name, orig in template_sd.items():
        info = meta.get(name)
        if info is None: continue
        if 'passthrough' in info:
            t = result[name]
            out[name] = t.to(orig.dtype) if t.dtype == torch.float16 and orig.dtype != torch.float16 else t
            continue
        q, s = result[name + '.q'], result[name + '.scale']
        out[name] = (q.float() * s.float().view(q.shape[0], *([1] * (q.ndim - 1)))).to(orig.dtype)
    return out

# ----------------------------------------
# Serialization
# ----------------------------------------

_BSHF_MAGIC = b'BSHF'

def _byte_shuffle(data, stride=2):
    if stride <= 1 or len(data) < stride: return data
    src = np.frombuffer(data, dtype=np.uint8)
    out = np.concatenate([src[pos::stride] for pos in range(stride)])
    return _BSHF_MAGIC + bytes([stride]) + out.tobytes()

def _byte_unshuffle(data):
    if len(data) < 5 or data[:4] != _BSHF_MAGIC: return data
    stride, payload = data[4], np.frombuffer(data, dtype=np.uint8, offset=5)
    n, src_off = len(payload), 0
    out = np.empty(n, dtype=np.uint8)
    for pos in range(stride):
        chunk_len = n // stride + (1 if pos < n % stride else 0)
        out[pos::stride] = payload[src_off : src_off + chunk_len]
        src_off += chunk_len
    return out.tobytes()

def compress_blob(data): return brotli.compress(_byte_shuffle(data), quality=11)

def decompress_blob(data): return _byte_unshuffle(brotli.decompress(data))

def serialize(h, base_model, hessians, code):
    code_bytes = len(code.encode('utf-8'))
    if h.is_main_process:
        torch.save(base_model.state_dict(), h.model_path)
        log(f'Serialized model: {os.path.getsize(h.model_path)} bytes')
        log(f'Code size: {code_bytes} bytes')
    total_bytes = 0
    if h.is_main_process:
        sd_cpu = {name: t.detach().cpu() for name, t in base_model.state_dict().items()}
        quant_result, quant_meta = gptq_mixed_quantize(sd_cpu, hessians, h)
        quant_buf = io.BytesIO()
        torch.save({'w': quant_result, 'm': quant_meta}, quant_buf)
        quant_blob = compress_blob(quant_buf.getvalue())
        with open(h.quantized_model_path, 'wb') as f: f.write(quant_blob)
        quant_file_bytes = len(quant_blob)
        total_bytes = quant_file_bytes + code_bytes
        log(f'Serialized model quantized+brotli: {quant_file_bytes} bytes')
        log(f'Total submission size quantized+brotli: {total_bytes} bytes')
        if total_bytes > h.size_limit: raise RuntimeError(f'submission too large: {total_bytes} > {h.size_limit}')
    if h.distributed: dist.barrier()
    return total_bytes

def deserialize(h, device):
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    with open(h.quantized_model_path, 'rb') as f: quant_blob = f.read()
    quant_state = torch.load(io.BytesIO(decompress_blob(quant_blob)), map_location='cpu')
    sd_template = {name: t.detach().cpu() for name, t in eval_model.state_dict().items()}
    eval_model.load_state_dict(dequantize_mixed(quant_state['w'], quant_state['m'], sd_template), strict=True)
    if h.num_loops > 0: eval_model.looping_active = True
    return eval_model

# ----------------------------------------
# Evaluation
# ----------------------------------------

def new_sums(device):
    # nll, tokens, bytes
    return torch.zeros(3, device=device, dtype=torch.float64)

def loss_bpb(h, sums):
    """Sums over all ranks -> (nats per token, bits per byte)."""
    if h.distributed: dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    loss_sum, token_count, byte_count = (float(v) for v in sums.tolist())
    val_loss = loss_sum / token_count
    return val_loss, val_loss / math.log(2.0) * (token_count / byte_count)

def eval_val(h, device, val_data, model):
    seq_len = h.eval_seq_len
    local_batch_tokens = h.val_batch_tokens // (h.world_size * h.grad_accum_steps)
    local_batch_seqs = max(1, local_batch_tokens // seq_len)
    total_tokens = val_data.val_tokens.numel() - 1
    total_seqs = math.ceil(total_tokens / seq_len)
    seq_start, seq_end = total_seqs * h.rank // h.world_size, total_seqs * (h.rank + 1) // h.world_size
    sums = new_sums(device)
    model.eval()
    with torch.no_grad():
        for first in range(seq_start, seq_end, local_batch_seqs):
            last = min(first + local_batch_seqs, seq_end)
            starts = [i * seq_len for i in range(first, last)]
            x, y, lens = window_batch(val_data, starts, seq_len, local_batch_seqs, device)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16): logits = model.forward_logits(x)
            nll = token_nll(logits, y)
            for i, n in enumerate(lens): add_scores(sums, val_data, nll[i, :n], x[i, :n], y[i, :n])
    model.train()
    return loss_bpb(h, sums)

def window_batch(val_data, starts, seq_len, batch_seqs, device):
    """Inputs and targets of the windows at `starts`, padded to one shape so that the compiled graph is built once."""
    total_tokens = val_data.val_tokens.numel() - 1
    x = torch.zeros(batch_seqs, seq_len, dtype=torch.int64)
    y = torch.zeros(batch_seqs, seq_len, dtype=torch.int64)
    lens = []
    for i, ws in enumerate(starts):
        we = min(ws + seq_len, total_tokens)
        piece = val_data.val_tokens[ws : we + 1].to(torch.int64)
        x[i, : we - ws], y[i, : we - ws] = piece[:-1], piece[1:]
        lens.append(we - ws)
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True), lens

def token_nll(logits, targets):
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction='none')
    return flat.reshape(targets.shape)

def add_scores(sums, val_data, nll, prev_ids, tgt_ids):
    sums[0] += nll.to(torch.float64).sum()
    sums[1] += float(nll.numel())
    sums[2] += val_data.byte_counts(prev_ids, tgt_ids).sum()

def sliding_starts(h, total_tokens):
    """Starts of the windows; each scores its last eval_stride targets, the first one all of its targets."""
    context_size = h.eval_seq_len - h.eval_stride
    return [ws for ws in range(0, total_tokens, h.eval_stride) if ws + context_size < total_tokens], context_size

def eval_val_sliding(h, device, val_data, base_model, batch_seqs=32):
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    seq_len, total_tokens = h.eval_seq_len, val_data.val_tokens.numel() - 1
    window_starts, context_size = sliding_starts(h, total_tokens)
    my_s = len(window_starts) * h.rank // h.world_size
    my_e = len(window_starts) * (h.rank + 1) // h.world_size
    my_windows = window_starts[my_s:my_e]
    sums = new_sums(device)
    with torch.inference_mode():
        for bi in range(0, len(my_windows), batch_seqs):
            batch_ws = my_windows[bi : bi + batch_seqs]
            x, y, lens = window_batch(val_data, batch_ws, seq_len, batch_seqs, device)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16): logits = logits_fn(x)
            nll = token_nll(logits, y)
            for i, (ws, n) in enumerate(zip(batch_ws, lens)):
                s = 0 if ws == 0 else context_size
                add_scores(sums, val_data, nll[i, s:n], x[i, s:n], y[i, s:n])
    base_model.train()
    return loss_bpb(h, sums)

def assign_windows(h, total_tokens):
    """Windows by the chunk in which their scored part begins; chunk and stride divide, so none crosses a border."""
    if h.ttt_chunk_tokens % h.eval_stride or h.ttt_chunk_tokens % h.eval_seq_len:
        raise ValueError('TTT_CHUNK_TOKENS must be a multiple of EVAL_STRIDE and EVAL_SEQ_LEN')
    window_starts, context_size = sliding_starts(h, total_tokens)
    num_chunks = math.ceil(total_tokens / h.ttt_chunk_tokens)
    chunk_windows = [[] for _ in range(num_chunks)]
    for ws in window_starts:
        scored_start = 0 if ws == 0 else ws + context_size
        chunk_windows[min(scored_start // h.ttt_chunk_tokens, num_chunks - 1)].append(ws)
    return chunk_windows, context_size

def ttt_score_chunk(h, device, val_data, logits_fn, windows, context_size, sums, batch_seqs):
    my_s, my_e = len(windows) * h.rank // h.world_size, len(windows) * (h.rank + 1) // h.world_size
    my_windows = windows[my_s:my_e]
    with torch.no_grad():
        for bi in range(0, len(my_windows), batch_seqs):
            batch_ws = my_windows[bi : bi + batch_seqs]
            x, y, lens = window_batch(val_data, batch_ws, h.eval_seq_len, batch_seqs, device)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16): logits = logits_fn(x)
            nll = token_nll(logits, y)
            for i, (ws, n) in enumerate(zip(batch_ws, lens)):
                s = 0 if ws == 0 else context_size
                add_scores(sums, val_data, nll[i, s:n], x[i, s:n], y[i, s:n])

def ttt_train_chunk(h, device, val_data, base_model, params, optimizer, chunk_start, chunk_end):
    """ttt_epochs passes over one chunk that is scored already; gradients are summed over ranks."""
    seq_len, chunk_seqs = h.eval_seq_len, (chunk_end - chunk_start) // h.eval_seq_len
    for _ in range(h.ttt_epochs):
        for first in range(0, chunk_seqs, h.ttt_batch_seqs):
            ids = list(range(first, min(first + h.ttt_batch_seqs, chunk_seqs)))
            mine = ids[h.rank :: h.world_size]
            optimizer.zero_grad(set_to_none=True)
            if mine:
                starts = [chunk_start + i * seq_len for i in mine]
                x, y, _ = window_batch(val_data, starts, seq_len, len(mine), device)
                with torch.autocast(device_type='cuda', dtype=torch.bfloat16): loss = base_model(x, y)
                (loss * (len(mine) / len(ids))).backward()
            if h.distributed:
                for p in params:
                    if p.grad is None: p.grad = torch.zeros_like(p)
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()

def eval_val_ttt(h, device, val_data, base_model, batch_seqs=32):
    """Legal score-first TTT: a chunk is scored with weights that saw earlier chunks only, then trained on."""
    total_tokens, chunk = val_data.val_tokens.numel() - 1, h.ttt_chunk_tokens
    chunk_windows, context_size = assign_windows(h, total_tokens)
    num_chunks = len(chunk_windows)
    log(f'ttt:start chunks={num_chunks} lr={h.ttt_lr} epochs={h.ttt_epochs}')
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    params = [p.requires_grad_(True) for p in base_model.parameters()]
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    sums, t0 = new_sums(device), time.perf_counter()
    for ci in range(num_chunks):
        if not chunk_windows[ci]: continue
        chunk_start, chunk_end = ci * chunk, min((ci + 1) * chunk, total_tokens)
        base_model.eval()
        ttt_score_chunk(h, device, val_data, logits_fn, chunk_windows[ci], context_size, sums, batch_seqs)
        if ci < num_chunks - 1:
            base_model.train()
            cos_lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups: group['lr'] = cos_lr
            ttt_train_chunk(h, device, val_data, base_model, params, optimizer, chunk_start, chunk_end)
        if ci % 100 == 0 or ci == num_chunks - 1:
            running = sums.tolist()
            log(f'ttt:chunk {ci + 1}/{num_chunks} rank0_loss:{running[0] / max(running[1], 1.0):.6f} time:{time.perf_counter() - t0:.1f}s')
    base_model.eval()
    result = loss_bpb(h, sums)
    log(f'ttt:scored tokens:{int(sums[1].item())} of {total_tokens} bytes:{int(sums[2].item())}')
    return result

def timed_eval(label, fn, *args, **kwargs):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args, **kwargs)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f'{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms')
    return val_loss, val_bpb

# ----------------------------------------
# Training
# ----------------------------------------

def reduce_grads(h, params):
    if not h.distributed: return
    grads = [p.grad for p in params if p.grad is not None]
    by_dtype = collections.defaultdict(list)
    for g in grads: by_dtype[g.dtype].append(g)
    for same in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        offset = 0
        for g in same:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()

def train_model(h, device, val_data):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    log(f'model_params:{sum(p.numel() for p in base_model.parameters())}')
    log(f'loop:encoder={base_model.loop_encoder} decoder={base_model.loop_decoder} parallel_from={h.parallel_start_layer}')
    optimizers = Optimizers(h, base_model)
    train_loader = ShuffledSequenceLoader(h, device)

    # The clock of the run ends gptq_reserve_seconds before the cap: the Hessians are collected in what is left.
    max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    log(f'gptq:reserving {h.gptq_reserve_seconds:.0f}s, effective={max_wallclock_ms:.0f}ms')

    def training_frac(step, elapsed_ms):
        return max(step / max(h.iterations, 1), elapsed_ms / max(max_wallclock_ms, 1e-9))

    def lr_mul(frac):
        if h.warmdown_frac <= 0: return 1.0
        if frac >= 1.0 - h.warmdown_frac: return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def train_step(step, lr_scale):
        optimizers.zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for _ in range(h.grad_accum_steps):
            x, y = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16, enabled=True): loss = compiled_model(x, y)
            train_loss += loss.detach() / h.grad_accum_steps
            (loss / h.grad_accum_steps).backward()
        reduce_grads(h, optimizers.replicated)
        frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
        optimizers.set_lr(lr_scale, (1 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum)
        if h.grad_clip_norm > 0: torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        return train_loss

    # Compile both graphs (loop off, loop on) on training batches, then put weights, optimizers and loader back
    if h.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        for warmup_step in range(h.warmup_steps):
            if h.num_loops > 0 and warmup_step == h.warmup_steps // 2: base_model.looping_active = True
            train_step(warmup_step, 1.0)
        log(f'warmup_step: {h.warmup_steps}/{h.warmup_steps}')
        base_model.looping_active = False
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True): opt.load_state_dict(state)
        optimizers.zero_grad_all()
        train_loader = ShuffledSequenceLoader(h, device)

    ema = WeightEMA(base_model, h.ema_decay)
    training_time_ms, stop_after_step, step = 0.0, None, 0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f'{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}')
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            if stop_after_step is not None and step < h.iterations:
                log(f'stopping_early: wallclock_cap train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}')
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f'layer_loop:enabled step:{step} frac:{frac:.3f}')
        train_loss = train_step(step, lr_mul(frac))
        ema.update(base_model)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            tok_per_sec = step * h.train_batch_tokens / (approx_ms / 1000.0)
            log(f'{step}/{h.iterations} train_loss: {train_loss.item():.4f} train_time: {approx_ms / 60000:.1f}m tok/s: {tok_per_sec:.0f}')
        # every rank must stop at the same step
        reached_cap = approx_ms >= max_wallclock_ms
        if h.distributed:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap: stop_after_step = step
    log(f'peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB')

    t_gptq = time.perf_counter()
    log('ema:applying EMA weights')
    ema.copy_to(base_model)
    base_model.looping_active = h.num_loops > 0
    hessians = collect_hessians(base_model, train_loader, h, device, h.gptq_calibration_batches)
    torch.cuda.synchronize()
    gptq_ms = 1000.0 * (time.perf_counter() - t_gptq)
    log(f'gptq:{len(hessians)} Hessians in {gptq_ms:.0f}ms, train+gptq {training_time_ms + gptq_ms:.0f}ms')
    if training_time_ms + gptq_ms > 1000.0 * h.max_wallclock_seconds: log('gptq:OVER THE CAP, raise GPTQ_RESERVE_SECONDS')
    return base_model, compiled_model, hessians

# ----------------------------------------
# Main
# ----------------------------------------

def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)

    val_data = ValidationData(h, device)
    log(f'train_shards: {len(list(Path(h.datasets_dir).resolve().glob("fineweb_train_*.bin")))}')
    log(f'val_tokens: {val_data.val_tokens.numel() - 1}')

    base_model, compiled_model, hessians = train_model(h, device, val_data)
    torch._dynamo.reset()
    timed_eval('pre-quantization post-ema', eval_val, h, device, val_data, base_model)

    serialize(h, base_model, hessians, Path(__file__).read_text(encoding='utf-8'))
    del base_model, compiled_model, hessians
    torch.cuda.empty_cache()
    if h.distributed: dist.barrier()

    t_eval = time.perf_counter()
    eval_model = deserialize(h, device)
    final_loss, final_bpb = timed_eval('quantized', eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        final_loss, final_bpb = timed_eval('quantized_sliding_window', eval_val_sliding, h, device, val_data, eval_model, h.eval_batch_seqs)
    if h.ttt_enabled:
        del eval_model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        final_loss, final_bpb = timed_eval('quantized_ttt', eval_val_ttt, h, device, val_data, ttt_model, h.eval_batch_seqs)
        del ttt_model
    log(f'total_eval_time:{time.perf_counter() - t_eval:.1f}s')
    log(f'final val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}')

def main():
    h = Hyperparameters()
    if h.world_size <= 0: raise ValueError(f'WORLD_SIZE must be positive, got {h.world_size}')
    if 8 % h.world_size != 0: raise ValueError(f'WORLD_SIZE={h.world_size} must divide 8')
    if not torch.cuda.is_available(): raise RuntimeError('CUDA is required')
    device = torch.device('cuda', h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend='nccl', device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision('high')
    from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_math_sdp, enable_mem_efficient_sdp
    enable_cudnn_sdp(False)
    enable_flash_sdp(True)
    enable_mem_efficient_sdp(False)
    enable_math_sdp(False)
    torch._dynamo.config.optimize_ddp = False

    set_logging_hparams(h)
    if h.is_main_process:
        os.makedirs('logs', exist_ok=True)
        log('Hyperparameters:')
        for k, v in sorted(vars(type(h)).items()):
            if not k.startswith('_'): log(f'  {k}: {v}')
        log(Path(__file__).read_text(encoding='utf-8'), console=False)
        log(f'Running Python {sys.version}', console=False)
        log(f'Running PyTorch {torch.__version__}', console=False)
        smi = subprocess.run(['nvidia-smi'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        log(smi.stdout, console=False)
    train_and_eval(h, device)
    if h.distributed: dist.destroy_process_group()

if __name__ == '__main__':
    main()
