import copy
import glob
import io
import math
import os
import random
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
from flash_attn_interface import flash_attn_func as flash_attn_3_func
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Hyperparameters:
    # data
    data_dir = os.environ.get('DATA_DIR', './data/')
    vocab_size = int(os.environ.get('VOCAB_SIZE', 8192))
    datasets_dir = os.path.join(data_dir, 'datasets', f'fineweb10B_sp{vocab_size}')
    train_files = os.path.join(datasets_dir, 'fineweb_train_*.bin')
    val_files = os.path.join(datasets_dir, 'fineweb_val_*.bin')
    tokenizer_path = os.path.join(data_dir, 'tokenizers', f'fineweb_{vocab_size}_bpe.model')
    seed = int(os.environ.get('SEED', 1337))
    run_id = os.environ.get('RUN_ID', str(uuid.uuid4()))
    # schedule
    iterations = int(os.environ.get('ITERATIONS', 20000))
    warmdown_frac = float(os.environ.get('WARMDOWN_FRAC', 0.72))
    warmup_steps = int(os.environ.get('WARMUP_STEPS', 20))
    train_batch_tokens = int(os.environ.get('TRAIN_BATCH_TOKENS', 2048 * 48 * 8))
    train_seq_len = int(os.environ.get('TRAIN_SEQ_LEN', 2048))
    train_log_every = int(os.environ.get('TRAIN_LOG_EVERY', 500))
    max_wallclock_seconds = float(os.environ.get('MAX_WALLCLOCK_SECONDS', 600.0))
    # evaluation
    val_batch_tokens = int(os.environ.get('VAL_BATCH_TOKENS', 2048 * 32 * 8))
    eval_seq_len = int(os.environ.get('EVAL_SEQ_LEN', 2048))
    eval_stride = int(os.environ.get('EVAL_STRIDE', 64))
    eval_batch_seqs = int(os.environ.get('EVAL_BATCH_SEQS', 32))
    val_loss_every = int(os.environ.get('VAL_LOSS_EVERY', 4000))
    sliding_window_enabled = bool(int(os.environ.get('SLIDING_WINDOW_ENABLED', '1')))
    # model
    num_layers = int(os.environ.get('NUM_LAYERS', 11))
    model_dim = int(os.environ.get('MODEL_DIM', 512))
    num_heads = int(os.environ.get('NUM_HEADS', 8))
    num_kv_heads = int(os.environ.get('NUM_KV_HEADS', 4))
    mlp_mult = float(os.environ.get('MLP_MULT', 4.0))
    xsa_last_n = int(os.environ.get('XSA_LAST_N', 11))
    rope_base = float(os.environ.get('ROPE_BASE', 10000.0))
    rope_dims = int(os.environ.get('ROPE_DIMS', 16))
    logit_softcap = float(os.environ.get('LOGIT_SOFTCAP', 30.0))
    qk_gain_init = float(os.environ.get('QK_GAIN_INIT', 5.25))
    ln_scale = bool(int(os.environ.get('LN_SCALE', '1')))
    skip_gates_enabled = bool(int(os.environ.get('SKIP_GATES_ENABLED', '1')))
    smear_gate_enabled = bool(int(os.environ.get('SMEAR_GATE_ENABLED', '1')))
    tied_embed_init_std = float(os.environ.get('TIED_EMBED_INIT_STD', 0.005))
    # depth recurrence: layers loop_start..loop_end run 1 + num_loops times once switched on
    num_loops = int(os.environ.get('NUM_LOOPS', 2))
    loop_start = int(os.environ.get('LOOP_START', 3))
    loop_end = int(os.environ.get('LOOP_END', 5))
    enable_looping_at = float(os.environ.get('ENABLE_LOOPING_AT', 0.35))
    parallel_residual_start = int(os.environ.get('PARALLEL_RESIDUAL_START', 7))
    # optimizer
    min_lr = float(os.environ.get('MIN_LR', 0.0))
    embed_lr = float(os.environ.get('EMBED_LR', 0.03))
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
    # quantization
    gptq_calibration_batches = int(os.environ.get('GPTQ_CALIBRATION_BATCHES', 64))
    gptq_calibration_seqs = int(os.environ.get('GPTQ_CALIBRATION_SEQS', 8))
    gptq_reserve_seconds = float(os.environ.get('GPTQ_RESERVE_SECONDS', 24.0))
    gptq_block_size = int(os.environ.get('GPTQ_BLOCK_SIZE', 128))
    matrix_bits = int(os.environ.get('MATRIX_BITS', 6))
    embed_bits = int(os.environ.get('EMBED_BITS', 8))
    matrix_clip_sigmas = float(os.environ.get('MATRIX_CLIP_SIGMAS', 12.85))
    embed_clip_sigmas = float(os.environ.get('EMBED_CLIP_SIGMAS', 20.0))
    byte_shuffle_stride = int(os.environ.get('BYTE_SHUFFLE_STRIDE', 2))
    # legal score-first TTT
    ttt_enabled = bool(int(os.environ.get('TTT_ENABLED', '1')))
    ttt_lr = float(os.environ.get('TTT_LR', 0.005))
    ttt_momentum = float(os.environ.get('TTT_MOMENTUM', 0.9))
    ttt_epochs = int(os.environ.get('TTT_EPOCHS', 3))
    ttt_chunk_tokens = int(os.environ.get('TTT_CHUNK_TOKENS', 32768))
    ttt_freeze_blocks = int(os.environ.get('TTT_FREEZE_BLOCKS', 0))
    ttt_batch_seqs = int(os.environ.get('TTT_BATCH_SEQS', 32))
    ttt_grad_clip = float(os.environ.get('TTT_GRAD_CLIP', 1.0))
    # distributed
    distributed = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
    rank = int(os.environ.get('RANK', '0'))
    world_size = int(os.environ.get('WORLD_SIZE', '1'))
    local_rank = int(os.environ.get('LOCAL_RANK', '0'))
    is_main_process = rank == 0
    grad_accum_steps = max(8 // world_size, 1)
    # output
    max_total_bytes = 16_000_000
    logfile = f'logs/{run_id}.txt'
    model_path = 'final_model.pt'
    quantized_model_path = 'final_model.int6.ptz'


CONTROL_PATTERNS = ('attn_scale', 'mlp_scale', 'resid_mix', 'q_gain', 'skip_weights', 'skip_gates', 'smear')
BOS_ID = 1
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
            print(msg, flush=True)
        if _logger_hparams.logfile is not None:
            with open(_logger_hparams.logfile, 'a', encoding='utf-8') as f:
                print(msg, file=f)


# ---- data


SHARD_HEADER_WORDS = 256
SHARD_MAGIC = 20240520


def load_data_shard(file):
    header_bytes = SHARD_HEADER_WORDS * np.dtype('<i4').itemsize
    token_bytes = np.dtype('<u2').itemsize
    header = np.fromfile(file, dtype='<i4', count=SHARD_HEADER_WORDS)
    if header.size != SHARD_HEADER_WORDS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f'Unexpected shard header for {file}')
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f'Shard size mismatch for {file}: expected {expected_size} bytes')
    tokens_np = np.fromfile(file, dtype='<u2', count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f'Short read for {file}')
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f'No files found for pattern: {pattern}')
    tokens = torch.cat([load_data_shard(file) for file in files]).contiguous()
    if tokens.numel() < 2:
        raise ValueError('Validation split is empty')
    return tokens


class ShuffledSequenceLoader:
    """Every rank owns a disjoint slice of the shards and draws random, non-overlapping sequences from them."""

    def __init__(self, h, device, seed_offset=0):
        self.seq_len = h.train_seq_len
        self.world_size = h.world_size
        self.device = device
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f'No files found for pattern: {h.train_files}')
        self.files = all_files[h.rank::h.world_size] or all_files
        self.rng = np.random.Generator(np.random.PCG64(h.seed + 1000 * seed_offset + h.rank))
        self.num_tokens = [self._read_num_tokens(file) for file in self.files]
        self.memmaps = {}
        self.start_inds = [[] for _ in self.files]
        for si in range(len(self.files)):
            self._reset_shard(si)

    @staticmethod
    def _read_num_tokens(file):
        header = np.fromfile(file, dtype='<i4', count=SHARD_HEADER_WORDS)
        if int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
            raise ValueError(f'Unexpected shard header for {file}')
        return int(header[2])

    def _tokens(self, si):
        if si not in self.memmaps:
            offset = SHARD_HEADER_WORDS * np.dtype('<i4').itemsize
            self.memmaps[si] = np.memmap(
                self.files[si], mode='r', dtype='<u2', offset=offset, shape=(self.num_tokens[si],)
            )
        return self.memmaps[si]

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
                for si in range(len(self.files)):
                    self._reset_shard(si)
                remaining = np.array([len(s) for s in self.start_inds], dtype=np.float64)
                total = remaining.sum()
            si = int(self.rng.choice(len(self.files), p=remaining / total))
            start = self.start_inds[si].pop()
            remaining[si] -= 1
            window = torch.from_numpy(
                np.array(self._tokens(si)[start:start + self.seq_len + 1], dtype=np.int64)
            )
            x[bi] = window[:-1]
            y[bi] = window[1:]
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


# ---- byte accounting


def build_sentencepiece_luts(sp, vocab_size, device):
    """Bytes of the original text per piece, without the leading space, which counts unless a boundary precedes it."""
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    if sp.piece_to_id('\u2581') == sp.unk_id():
        raise ValueError("Tokenizer must have a piece for a lone space, or spaces would go through byte fallback")
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_token_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_token_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith('\u2581'):
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
            raise ValueError(f'VOCAB_SIZE={h.vocab_size} does not match tokenizer {int(self.sp.vocab_size())}')
        self.val_tokens = load_validation_tokens(h.val_files)
        luts = build_sentencepiece_luts(self.sp, h.vocab_size, device)
        self.base_bytes_lut, self.has_leading_space_lut, self.is_boundary_token_lut = luts

    def count_bytes(self, prev_ids, tgt_ids):
        token_bytes = self.base_bytes_lut[tgt_ids].to(torch.float64)
        spaced = self.has_leading_space_lut[tgt_ids] & ~self.is_boundary_token_lut[prev_ids]
        token_bytes += spaced.to(torch.float64)
        return token_bytes.sum()


# ---- model


class RMSNorm(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    def forward(self, x):
        w = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, w, bias)


class Rotary(nn.Module):
    def __init__(self, dim, base=10000.0, train_seq_len=2048, rope_dims=0):
        super().__init__()
        self.base = base
        self.train_seq_len = train_seq_len
        self.rope_dims = rope_dims if rope_dims > 0 else dim
        inv_freq = 1.0 / base ** (torch.arange(0, self.rope_dims, 2, dtype=torch.float32) / self.rope_dims)
        self.register_buffer('inv_freq', inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None

    def forward(self, seq_len, device, dtype):
        stale = self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device
        if stale:
            rd = self.rope_dims
            if seq_len > self.train_seq_len:
                scale = seq_len / self.train_seq_len
                new_base = self.base * scale ** (rd / (rd - 2))
                inv_freq = 1.0 / new_base ** (torch.arange(0, rd, 2, dtype=torch.float32, device=device) / rd)
            else:
                inv_freq = self.inv_freq.to(device)
            t = torch.arange(seq_len, device=device, dtype=inv_freq.dtype)
            freqs = torch.outer(t, inv_freq)
            self._cos_cached = freqs.cos()[None, :, None, :]
            self._sin_cached = freqs.sin()[None, :, None, :]
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x, cos, sin, rope_dims=0):
    if rope_dims > 0 and rope_dims < x.size(-1):
        x_rope, x_pass = x[..., :rope_dims], x[..., rope_dims:]
        half = rope_dims // 2
        x1, x2 = x_rope[..., :half], x_rope[..., half:]
        x_rope = torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)
        return torch.cat((x_rope, x_pass), dim=-1)
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads, num_kv_heads, rope_base, qk_gain_init, train_seq_len):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError('model_dim must be divisible by num_heads')
        if num_heads % num_kv_heads != 0:
            raise ValueError('num_heads must be divisible by num_kv_heads')
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rope_dims = 0
        self.rotary = Rotary(self.head_dim, base=rope_base, train_seq_len=train_seq_len)
        self.use_xsa = False

    def _xsa(self, y, v):
        """Takes out of each head's output what lies along the position's own value."""
        b, t, h, d = y.shape
        hkv = v.size(-2)
        y_g = y.reshape(b, t, hkv, h // hkv, d)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        proj = (y_g * vn).sum(dim=-1, keepdim=True) * vn
        return (y_g - proj).reshape(b, t, h, d)

    def forward(self, x):
        b, t, dim = x.shape
        q = self.c_q(x).reshape(b, t, self.num_heads, self.head_dim)
        k = self.c_k(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        v = self.c_v(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, None, :, None]
        y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._xsa(y, v)
        return self.proj(y.reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, dim, mlp_mult):
        super().__init__()
        hidden = int(mlp_mult * dim)
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class SmearGate(nn.Module):
    """Mixes a little of the previous token's embedding into each; a document's first token takes nothing."""

    def __init__(self, dim):
        super().__init__()
        self.gate = nn.Parameter(torch.full((dim,), -3.0, dtype=torch.float32))

    def forward(self, x, input_ids):
        x_prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = (input_ids != BOS_ID).unsqueeze(-1).to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * x_prev * inside


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(
            h.model_dim, h.num_heads, h.num_kv_heads, h.rope_base, h.qk_gain_init, h.train_seq_len
        )
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0
        self.parallel = layer_idx >= h.parallel_residual_start

    def forward(self, x, x0):
        mix = self.resid_mix.to(dtype=x.dtype)
        x_in = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x_in) * self.ln_scale_factor)
        attn_out = self.attn_scale.to(dtype=x_in.dtype)[None, None, :] * attn_out
        mlp_scale = self.mlp_scale.to(dtype=x_in.dtype)[None, None, :]
        if self.parallel:
            mlp_out = mlp_scale * self.mlp(self.mlp_norm(x_in) * self.ln_scale_factor)
            return x_in + attn_out + mlp_out
        x_out = x_in + attn_out
        return x_out + mlp_scale * self.mlp(self.mlp_norm(x_out) * self.ln_scale_factor)


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        if h.logit_softcap <= 0.0:
            raise ValueError('logit_softcap must be positive')
        self.logit_softcap = h.logit_softcap
        self.tied_embed_init_std = h.tied_embed_init_std
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear = SmearGate(h.model_dim) if h.smear_gate_enabled else None
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        head_dim = h.model_dim // h.num_heads
        if h.rope_dims > 0:
            for block in self.blocks:
                block.attn.rope_dims = h.rope_dims
                block.attn.rotary = Rotary(head_dim, h.rope_base, h.train_seq_len, h.rope_dims)
        for i in range(max(0, h.num_layers - h.xsa_last_n), h.num_layers):
            self.blocks[i].attn.use_xsa = True
        self.final_norm = RMSNorm()
        self.looping_active = False
        flat = list(range(h.num_layers))
        looped = list(range(h.loop_start))
        for _ in range(h.num_loops + 1):
            looped += list(range(h.loop_start, h.loop_end + 1))
        looped += list(range(h.loop_end + 1, h.num_layers))
        self.flat_encoder, self.flat_decoder = flat[:len(flat) // 2], flat[len(flat) // 2:]
        self.loop_encoder, self.loop_decoder = looped[:len(looped) // 2], looped[len(looped) // 2:]
        self.num_skip_weights = min(len(self.loop_encoder), len(self.loop_decoder))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self.skip_gates = None
        if h.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(self.num_skip_weights, h.model_dim, dtype=torch.float32))
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if getattr(module, '_zero_init', False):
                nn.init.zeros_(module.weight)
            elif module.weight.ndim == 2 and min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight, gain=1.0)

    def hidden(self, input_ids):
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        if self.smear is not None:
            x = self.smear(x, input_ids)
        x0 = x
        skips = []
        encoder = self.loop_encoder if self.looping_active else self.flat_encoder
        decoder = self.loop_decoder if self.looping_active else self.flat_decoder
        for i in encoder:
            x = self.blocks[i](x, x0)
            skips.append(x)
        for skip_idx, i in enumerate(decoder):
            if skip_idx < self.num_skip_weights and skips:
                scaled = self.skip_weights[skip_idx].to(dtype=x.dtype)[None, None, :] * skips.pop()
                if self.skip_gates is not None:
                    g = torch.sigmoid(self.skip_gates[skip_idx].to(dtype=x.dtype))[None, None, :]
                    x = torch.lerp(scaled, x, g)
                else:
                    x = x + scaled
            x = self.blocks[i](x, x0)
        return self.final_norm(x)

    def forward_logits(self, input_ids):
        logits_proj = F.linear(self.hidden(input_ids), self.tok_emb.weight.to(torch.bfloat16))
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward(self, input_ids, target_ids):
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction='mean')


def restore_fp32_params(model):
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    for name, param in model.named_parameters():
        small = param.ndim < 2 or any(pattern in name for pattern in CONTROL_PATTERNS)
        if small and param.dtype != torch.float32:
            param.data = param.data.float()


# ---- optimizers


@torch.compile
def zeropower_via_newtonschulz5(G, steps=10, eps=1e-7):
    a, b, c = 3.4445, -4.775, 2.0315
    X = G.bfloat16()
    X /= X.norm() + eps
    transposed = G.size(0) > G.size(1)
    if transposed:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.T if transposed else X


class Muon(torch.optim.Optimizer):
    """MuonEq-R: the momentum's rows are brought to one norm before they are orthogonalised."""

    def __init__(self, params, lr, momentum, backend_steps, nesterov=True, weight_decay=0.0, row_normalize=False):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                nesterov=nesterov,
                weight_decay=weight_decay,
                row_normalize=row_normalize,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group['params']
            if not params:
                continue
            lr, momentum = group['lr'], group['momentum']
            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if 'momentum_buffer' not in state:
                        state['momentum_buffer'] = torch.zeros_like(g)
                    buf = state['momentum_buffer']
                    buf.mul_(momentum).add_(g)
                    if group['nesterov']:
                        g = g.add(buf, alpha=momentum)
                    else:
                        g = buf
                    if group['row_normalize']:
                        row_norms = g.float().norm(dim=-1, keepdim=True).clamp_min(1e-7)
                        g = g / row_norms.to(g.dtype)
                    g = zeropower_via_newtonschulz5(g, steps=group['backend_steps'])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr:curr + p.numel()] = g.reshape(-1)
                curr += p.numel()
            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)
            curr = 0
            for p in params:
                if group['weight_decay'] > 0.0:
                    p.data.mul_(1.0 - lr * group['weight_decay'])
                g = updates_flat[curr:curr + p.numel()].view_as(p).to(dtype=p.dtype)
                p.add_(g, alpha=-lr)
                curr += p.numel()


class Optimizers:
    def __init__(self, h, base_model):
        matrix_params, scalar_params = [], []
        for name, p in base_model.named_parameters():
            if name == 'tok_emb.weight':
                continue
            if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_PATTERNS):
                matrix_params.append(p)
            else:
                scalar_params.append(p)
        tok_params = [{'params': [base_model.tok_emb.weight], 'lr': h.embed_lr, 'base_lr': h.embed_lr}]
        betas = (h.beta1, h.beta2)
        self.optimizer_tok = torch.optim.AdamW(
            tok_params, betas=betas, eps=h.adam_eps, weight_decay=h.embed_wd, fused=True
        )
        self.optimizer_muon = Muon(
            matrix_params,
            lr=h.matrix_lr,
            momentum=h.muon_momentum,
            backend_steps=h.muon_backend_steps,
            weight_decay=h.muon_wd,
            row_normalize=h.muon_row_normalize,
        )
        for group in self.optimizer_muon.param_groups:
            group['base_lr'] = h.matrix_lr
        scalar_groups = [{'params': scalar_params, 'lr': h.scalar_lr, 'base_lr': h.scalar_lr}]
        self.optimizer_scalar = torch.optim.AdamW(
            scalar_groups, betas=betas, eps=h.adam_eps, weight_decay=h.adam_wd, fused=True
        )
        self.optimizers = [self.optimizer_tok, self.optimizer_muon, self.optimizer_scalar]

    def __iter__(self):
        return iter(self.optimizers)

    def zero_grad_all(self):
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def step(self, lr_scale, muon_momentum):
        for group in self.optimizer_muon.param_groups:
            group['momentum'] = muon_momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group['lr'] = group['base_lr'] * lr_scale
            opt.step()
        self.zero_grad_all()


# ---- quantization: GPTQ whose clip is a number of standard deviations of the row (SDClip)


def collect_hessians(model, train_loader, h, device):
    """X^T X of every matrix's inputs, and of the head's for the embedding, over batches of training tokens."""
    hessians = {}
    counts = {}
    hooks = []

    def accumulate(name, x):
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=device)
            counts[name] = 0
        hessians[name].addmm_(x.T, x)
        counts[name] += x.shape[0]

    def linear_hook(name):
        def hook(module, inputs, output):
            accumulate(name, inputs[0])
        return hook

    def head_hook(module, inputs, output):
        accumulate('tok_emb.weight', output)

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and module.weight.numel() > 65536:
            hooks.append(module.register_forward_hook(linear_hook(name + '.weight')))
    hooks.append(model.final_norm.register_forward_hook(head_hook))
    model.eval()
    calib_tokens = h.gptq_calibration_seqs * h.train_seq_len * h.world_size
    with torch.no_grad(), torch.autocast(device_type='cuda', dtype=torch.bfloat16):
        for _ in range(h.gptq_calibration_batches):
            x, _ = train_loader.next_batch(calib_tokens, 1)
            model.forward_logits(x)
    for hook in hooks:
        hook.remove()
    for name in hessians:
        if h.distributed:
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
        hessians[name] /= counts[name] * h.world_size
    return hessians


def gptq_quantize_weight(w, H, clip_sigmas, clip_range, block_size):
    W_orig = w.float().clone()
    rows, cols = W_orig.shape
    H = H.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    damp = 0.01 * H.diag().mean()
    H.diagonal().add_(damp)
    perm = torch.argsort(H.diag(), descending=True)
    invperm = torch.argsort(perm)
    W_perm = W_orig[:, perm].clone()
    W_perm[:, dead[perm]] = 0
    H = H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    row_std = W_orig.std(dim=1)
    s = (clip_sigmas * row_std / clip_range).clamp_min(1e-10).to(torch.float16)
    sf = s.float()
    Q = torch.zeros(rows, cols, dtype=torch.int8, device=w.device)
    W_work = W_perm.clone()
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        W_block = W_work[:, i1:i2].clone()
        Hinv_block = Hinv[i1:i2, i1:i2]
        Err = torch.zeros(rows, i2 - i1, device=w.device)
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


def quantize_state_dict(state_dict, hessians, h):
    """int6 for matrices, int8 for the embedding, float16 for whatever is small."""
    result, meta = {}, {}
    for name, tensor in state_dict.items():
        t = tensor.detach()
        if name not in hessians:
            result[name] = t.to(torch.float16).cpu() if t.is_floating_point() else t.cpu()
            meta[name] = 'passthrough'
            continue
        is_embed = name == 'tok_emb.weight'
        bits = h.embed_bits if is_embed else h.matrix_bits
        sigmas = h.embed_clip_sigmas if is_embed else h.matrix_clip_sigmas
        q, s = gptq_quantize_weight(t, hessians[name], sigmas, 2 ** (bits - 1) - 1, h.gptq_block_size)
        result[name + '.q'] = q.cpu()
        result[name + '.scale'] = s.cpu()
        meta[name] = f'gptq_int{bits}'
    return result, meta


def dequantize_state_dict(result, meta, template):
    out = {}
    for name, orig in template.items():
        if meta[name] == 'passthrough':
            out[name] = result[name].to(orig.dtype)
            continue
        q, s = result[name + '.q'], result[name + '.scale']
        out[name] = (q.float() * s.float().view(q.shape[0], 1)).to(orig.dtype)
    return out


# ---- packing


_BSHF_MAGIC = b'BSHF'


def _byte_shuffle(data, stride):
    if stride <= 1 or len(data) < stride:
        return data
    src = np.frombuffer(data, dtype=np.uint8)
    lanes = [src[pos::stride] for pos in range(stride)]
    return _BSHF_MAGIC + bytes([stride]) + np.concatenate(lanes).tobytes()


def _byte_unshuffle(data):
    if data[:4] != _BSHF_MAGIC:
        return data
    stride = data[4]
    payload = np.frombuffer(data, dtype=np.uint8, offset=5)
    out = np.empty(payload.size, dtype=np.uint8)
    start = 0
    for pos in range(stride):
        lane = out[pos::stride]
        lane[:] = payload[start:start + lane.size]
        start += lane.size
    return out.tobytes()


def compress(data, h):
    return brotli.compress(_byte_shuffle(data, h.byte_shuffle_stride), quality=11, lgwin=24)


def decompress(blob):
    return _byte_unshuffle(brotli.decompress(blob))


def serialize(h, result, meta):
    """Writes the packed model on rank 0 and prints what the submission weighs."""
    code_bytes = len(Path(__file__).read_bytes())
    if h.is_main_process:
        buf = io.BytesIO()
        torch.save({'w': result, 'm': meta}, buf)
        blob = compress(buf.getvalue(), h)
        with open(h.quantized_model_path, 'wb') as f:
            f.write(blob)
        total_bytes = len(blob) + code_bytes
        log(f'Code size: {code_bytes} bytes')
        log(f'Serialized model quantized+brotli: {len(blob)} bytes')
        log(f'Total submission size quantized+brotli: {total_bytes} bytes')
        if total_bytes > h.max_total_bytes:
            raise ValueError(f'{total_bytes} bytes are more than {h.max_total_bytes}')
    if h.distributed:
        dist.barrier()


def deserialize(h, device):
    eval_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(eval_model)
    with open(h.quantized_model_path, 'rb') as f:
        packed = torch.load(io.BytesIO(decompress(f.read())), map_location='cpu')
    template = {k: v.detach().cpu() for k, v in eval_model.state_dict().items()}
    eval_model.load_state_dict(dequantize_state_dict(packed['w'], packed['m'], template), strict=True)
    eval_model.looping_active = h.num_loops > 0
    return eval_model


# ---- evaluation


def reduce_totals(h, *totals):
    if h.distributed:
        for t in totals:
            dist.all_reduce(t, op=dist.ReduceOp.SUM)


def loss_and_bpb(loss_sum, token_count, byte_count):
    val_loss = (loss_sum / token_count).item()
    val_bpb = val_loss / math.log(2.0) * (token_count.item() / byte_count.item())
    return val_loss, val_bpb


def new_totals(device):
    return [torch.zeros((), device=device, dtype=torch.float64) for _ in range(3)]


def build_windows(total, seq_len, stride):
    """(start, first scored, end) of every window, in positions of inputs; each position is scored by one window."""
    windows = [(0, 0, min(seq_len, total))]
    pos = windows[0][2]
    while pos < total:
        end = min(pos + stride, total)
        windows.append((max(0, end - seq_len), pos, end))
        pos = end
    return windows


def window_batch(val_tokens, batch, seq_len, device):
    """Inputs and targets of some windows, filled up on the right to one length."""
    x = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
    y = torch.zeros(len(batch), seq_len, dtype=torch.int64, device=device)
    for i, (start, _, end) in enumerate(batch):
        piece = val_tokens[start:end + 1].to(dtype=torch.int64, device=device)
        x[i, :end - start] = piece[:-1]
        y[i, :end - start] = piece[1:]
    return x, y


def token_losses(logits, y):
    flat = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction='none')
    return flat.reshape(y.shape).to(torch.float64)


def eval_val(h, device, val_data, model):
    """The plain loss over sequences that stand side by side; a look at the model while it trains."""
    seq_len = h.eval_seq_len
    total = val_data.val_tokens.numel() - 1
    spans = [(start, start, min(start + seq_len, total)) for start in range(0, total, seq_len)]
    my_spans = spans[len(spans) * h.rank // h.world_size:len(spans) * (h.rank + 1) // h.world_size]
    batch_seqs = max(h.val_batch_tokens // (h.world_size * h.grad_accum_steps * seq_len), 1)
    loss_sum, token_count, byte_count = new_totals(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for lo in range(0, len(my_spans), batch_seqs):
            batch = my_spans[lo:lo + batch_seqs]
            x, y = window_batch(val_data.val_tokens, batch, seq_len, device)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16):
                logits = model.forward_logits(x)
            nll = token_losses(logits, y)
            for row, (start, _, end) in enumerate(batch):
                n = end - start
                loss_sum += nll[row, :n].sum()
                token_count += n
                byte_count += val_data.count_bytes(x[row, :n], y[row, :n])
    reduce_totals(h, loss_sum, token_count, byte_count)
    model.train(was_training)
    return loss_and_bpb(loss_sum, token_count, byte_count)


def eval_val_sliding(h, device, val_data, base_model):
    """Every token with a context of nearly eval_seq_len, by the fixed model."""
    seq_len = h.eval_seq_len
    base_model.eval()
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)
    windows = build_windows(val_data.val_tokens.numel() - 1, seq_len, h.eval_stride)
    mine = windows[len(windows) * h.rank // h.world_size:len(windows) * (h.rank + 1) // h.world_size]
    loss_sum, token_count, byte_count = new_totals(device)
    with torch.no_grad():
        for lo in range(0, len(mine), h.eval_batch_seqs):
            batch = mine[lo:lo + h.eval_batch_seqs]
            x_batch, y_batch = window_batch(val_data.val_tokens, batch, seq_len, device)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16):
                logits = logits_fn(x_batch)
            nll = token_losses(logits, y_batch)
            for i, (start, first, end) in enumerate(batch):
                s, e = first - start, end - start
                loss_sum += nll[i, s:e].sum()
                token_count += e - s
                byte_count += val_data.count_bytes(x_batch[i, s:e], y_batch[i, s:e])
    reduce_totals(h, loss_sum, token_count, byte_count)
    base_model.train()
    return loss_and_bpb(loss_sum, token_count, byte_count)


def ttt_parameters(h, base_model):
    frozen = {f'blocks.{i}.' for i in range(min(h.ttt_freeze_blocks, h.num_layers))}
    params = []
    for name, p in base_model.named_parameters():
        p.requires_grad_(not any(name.startswith(prefix) for prefix in frozen))
        if p.requires_grad:
            params.append(p)
    return params


def train_on_chunk(h, device, val_data, base_model, params, optimizer, chunk_start, chunk_end):
    """SGD with momentum over one chunk's sequences, shared out over the ranks, gradients averaged."""
    seq_len = h.eval_seq_len
    num_seqs = (chunk_end - chunk_start) // seq_len
    if num_seqs < h.world_size:
        return
    lo, hi = num_seqs * h.rank // h.world_size, num_seqs * (h.rank + 1) // h.world_size
    base_model.train()
    for _ in range(h.ttt_epochs):
        for bs in range(lo, hi, h.ttt_batch_seqs):
            be = min(bs + h.ttt_batch_seqs, hi)
            first = chunk_start + bs * seq_len
            last = chunk_start + be * seq_len
            local = val_data.val_tokens[first:last + 1].to(device=device, dtype=torch.int64)
            x = local[:-1].reshape(-1, seq_len)
            y = local[1:].reshape(-1, seq_len)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type='cuda', dtype=torch.bfloat16):
                loss = base_model(x, y)
            loss.backward()
            if h.distributed:
                for p in params:
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
            torch.nn.utils.clip_grad_norm_(params, h.ttt_grad_clip)
            optimizer.step()


def eval_val_ttt(h, device, val_data, base_model):
    """Legal score-first TTT: a chunk is scored by weights that saw the chunks before it, then trained on."""
    seq_len, stride = h.eval_seq_len, h.eval_stride
    if h.ttt_chunk_tokens % stride or seq_len % stride or h.ttt_chunk_tokens < seq_len:
        raise ValueError('a window must not reach over the end of its chunk')
    total = val_data.val_tokens.numel() - 1
    num_chunks = (total + h.ttt_chunk_tokens - 1) // h.ttt_chunk_tokens
    chunk_windows = [[] for _ in range(num_chunks)]
    for window in build_windows(total, seq_len, stride):
        chunk_windows[window[1] // h.ttt_chunk_tokens].append(window)
    log(f'ttt:start chunks={num_chunks} lr={h.ttt_lr} epochs={h.ttt_epochs} freeze={h.ttt_freeze_blocks}')
    params = ttt_parameters(h, base_model)
    optimizer = torch.optim.SGD(params, lr=h.ttt_lr, momentum=h.ttt_momentum)
    loss_sum, token_count, byte_count = new_totals(device)
    t0 = time.perf_counter()
    for ci in range(num_chunks):
        windows = chunk_windows[ci]
        chunk_start = ci * h.ttt_chunk_tokens
        chunk_end = min((ci + 1) * h.ttt_chunk_tokens, total)
        # score
        my_windows = windows[len(windows) * h.rank // h.world_size:len(windows) * (h.rank + 1) // h.world_size]
        base_model.eval()
        with torch.no_grad():
            for lo in range(0, len(my_windows), h.eval_batch_seqs):
                batch = my_windows[lo:lo + h.eval_batch_seqs]
                xb, yb = window_batch(val_data.val_tokens, batch, seq_len, device)
                with torch.autocast(device_type='cuda', dtype=torch.bfloat16):
                    logits = base_model.forward_logits(xb)
                nll = token_losses(logits, yb)
                for i, (start, first, end) in enumerate(batch):
                    s, e = first - start, end - start
                    scored = nll[i, s:e]
                    loss_sum += scored.sum()
                    token_count += e - s
                    byte_count += val_data.count_bytes(xb[i, s:e], yb[i, s:e])
        # then train
        if ci < num_chunks - 1 and h.ttt_epochs > 0:
            cos_lr = h.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * ci / max(num_chunks - 1, 1)))
            for group in optimizer.param_groups:
                group['lr'] = cos_lr
            train_on_chunk(h, device, val_data, base_model, params, optimizer, chunk_start, chunk_end)
        if ci % 100 == 0:
            log(f'ttt:chunk {ci}/{num_chunks} time:{time.perf_counter() - t0:.1f}s')
    reduce_totals(h, loss_sum, token_count, byte_count)
    log(f'ttt:scored tokens:{int(token_count.item())} of {total} bytes:{int(byte_count.item())}')
    return loss_and_bpb(loss_sum, token_count, byte_count)


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    elapsed_ms = 1000.0 * (time.perf_counter() - t0)
    log(f'{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{elapsed_ms:.0f}ms')
    return val_loss, val_bpb


# ---- training


class Ema:
    def __init__(self, model, decay):
        self.decay = decay
        self.state = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        for name, t in model.state_dict().items():
            self.state[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def apply(self, model):
        current = model.state_dict()
        averaged = {name: t.to(dtype=current[name].dtype) for name, t in self.state.items()}
        model.load_state_dict(averaged, strict=True)


def lr_scale_at(h, frac):
    if h.warmdown_frac <= 0:
        return 1.0
    if frac >= 1.0 - h.warmdown_frac:
        return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
    return 1.0


def muon_momentum_at(h, step):
    frac = min(step / h.muon_momentum_warmup_steps, 1.0) if h.muon_momentum_warmup_steps > 0 else 1.0
    return (1.0 - frac) * h.muon_momentum_warmup_start + frac * h.muon_momentum


def train_step(h, model, base_model, optimizers, loader, step, frac):
    train_loss = torch.zeros((), device=loader.device)
    for micro_step in range(h.grad_accum_steps):
        if h.distributed:
            model.require_backward_grad_sync = micro_step == h.grad_accum_steps - 1
        x, y = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
        with torch.autocast(device_type='cuda', dtype=torch.bfloat16, enabled=True):
            loss = model(x, y)
        train_loss += loss.detach()
        (loss / h.grad_accum_steps).backward()
    if h.grad_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
    optimizers.step(lr_scale_at(h, frac), muon_momentum_at(h, step))
    return train_loss / h.grad_accum_steps


def warm_up(h, model, base_model, optimizers, device):
    """Compiles both depths on training batches; weights and optimizer states are put back afterwards."""
    initial_model = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
    initial_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = ShuffledSequenceLoader(h, device, seed_offset=7)
    for looping in (False, True):
        if looping and h.num_loops == 0:
            continue
        base_model.looping_active = looping
        for step in range(h.warmup_steps):
            train_step(h, model, base_model, optimizers, loader, step, 0.0)
        log(f'warmup: looping={looping} steps:{h.warmup_steps}')
    base_model.load_state_dict(initial_model, strict=True)
    for opt, state in zip(optimizers, initial_opts, strict=True):
        opt.load_state_dict(state)
    optimizers.zero_grad_all()
    base_model.looping_active = False


def train_model(h, device, val_data):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    if h.distributed:
        model = DDP(compiled_model, device_ids=[h.local_rank], broadcast_buffers=False)
    else:
        model = compiled_model
    log(f'model_params:{sum(p.numel() for p in base_model.parameters())}')
    optimizers = Optimizers(h, base_model)
    if h.warmup_steps > 0:
        warm_up(h, model, base_model, optimizers, device)
    train_loader = ShuffledSequenceLoader(h, device)
    ema = Ema(base_model, h.ema_decay)
    max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    log(f'gptq:reserving {h.gptq_reserve_seconds:.0f}s, training for {max_wallclock_ms:.0f}ms')
    training_time_ms = 0.0
    stop_after_step = None
    step = 0
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (h.val_loss_every > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(h, device, val_data, base_model)
            log(f'{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}')
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = max(step / max(h.iterations, 1), elapsed_ms / max(max_wallclock_ms, 1e-9))
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f'layer_loop:enabled step:{step} frac:{frac:.3f} encoder:{base_model.loop_encoder}')
        train_loss = train_step(h, model, base_model, optimizers, train_loader, step, min(frac, 1.0))
        ema.update(base_model)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if h.train_log_every > 0 and (step <= 5 or step % h.train_log_every == 0):
            rate = step * h.train_batch_tokens / (approx_ms / 1000.0)
            log(f'{step}/{h.iterations} train_loss: {train_loss.item():.4f} time: {approx_ms / 60000:.1f}m tok/s: {rate:.0f}')
        # all ranks stop at the same step
        reached_cap = approx_ms >= max_wallclock_ms
        if h.distributed:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step
            log(f'stopping_early: wallclock_cap train_time: {approx_ms:.0f}ms step: {step}/{h.iterations}')
    log(f'peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB')
    log('ema:applying EMA weights')
    ema.apply(base_model)
    base_model.looping_active = h.num_loops > 0
    return base_model, train_loader, training_time_ms


def quantize_model(h, device, base_model, train_loader, training_time_ms):
    """Calibration on training batches and GPTQ, both inside the seconds kept back from the training."""
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    hessians = collect_hessians(base_model, train_loader, h, device)
    log(f'gptq:collected {len(hessians)} hessians in {time.perf_counter() - t0:.1f}s')
    result, meta = quantize_state_dict(base_model.state_dict(), hessians, h)
    torch.cuda.synchronize()
    gptq_ms = 1000.0 * (time.perf_counter() - t0)
    log(f'gptq:done in {gptq_ms:.0f}ms, train+gptq {training_time_ms + gptq_ms:.0f}ms')
    return result, meta


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f'train_shards: {len(glob.glob(h.train_files))} val_tokens: {val_data.val_tokens.numel() - 1}')
    base_model, train_loader, training_time_ms = train_model(h, device, val_data)
    result, meta = quantize_model(h, device, base_model, train_loader, training_time_ms)
    timed_eval('pre-quantization post-ema', eval_val, h, device, val_data, base_model)
    serialize(h, result, meta)
    del base_model, result
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    eval_model = deserialize(h, device)
    final = timed_eval('quantized', eval_val, h, device, val_data, eval_model)
    if h.sliding_window_enabled:
        final = timed_eval('quantized_sliding_window', eval_val_sliding, h, device, val_data, eval_model)
    if h.ttt_enabled:
        del eval_model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        ttt_model = deserialize(h, device)
        final = timed_eval('quantized_ttt', eval_val_ttt, h, device, val_data, ttt_model)
    log(f'final val_loss:{final[0]:.8f} val_bpb:{final[1]:.8f}')


def main():
    h = Hyperparameters()
    if not torch.cuda.is_available():
        raise RuntimeError('CUDA is required')
    if h.world_size <= 0 or 8 % h.world_size != 0:
        raise ValueError(f'WORLD_SIZE={h.world_size} must divide 8')
    device = torch.device('cuda', h.local_rank)
    torch.cuda.set_device(device)
    if h.distributed:
        dist.init_process_group(backend='nccl', device_id=device)
        dist.barrier()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision('high')
    torch._dynamo.config.optimize_ddp = False
    set_logging_hparams(h)
    if h.is_main_process:
        os.makedirs('logs', exist_ok=True)
        log(Path(__file__).read_text(encoding='utf-8'), console=False)
        log(f'Running Python {sys.version}', console=False)
        log(f'Running PyTorch {torch.__version__}', console=False)
        smi = subprocess.run(['nvidia-smi'], capture_output=True, text=True, check=False).stdout
        log(smi, console=False)
        for k, v in sorted(vars(type(h)).items()):
            if not k.startswith('_'):
                log(f'  {k}: {v}')
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
