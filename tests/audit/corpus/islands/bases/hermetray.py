import brotli, collections, copy, glob, io, json, math, os, random, re, shutil, struct, subprocess, sys, tempfile, time, uuid
from pathlib import Path
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from flash_attn_interface import flash_attn_func as flash_attn_3_func, flash_attn_varlen_func


class Hyperparameters:
    data_dir = os.environ.get("DATA_DIR", "./data/")
    seed = int(os.environ.get("SEED", 1337))
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.85))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    val_batch_tokens = int(os.environ.get("VAL_BATCH_TOKENS", 524288))
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    logit_scale = float(os.environ.get("LOGIT_SCALE", 1.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    num_loops = int(os.environ.get("NUM_LOOPS", 2))
    loop_start = int(os.environ.get("LOOP_START", 3))
    loop_end = int(os.environ.get("LOOP_END", 5))
    enable_looping_at = float(os.environ.get("ENABLE_LOOPING_AT", 0.35))
    parallel_start_layer = int(os.environ.get("PARALLEL_START_LAYER", 8))
    gated_attn_enabled = bool(int(os.environ.get("GATED_ATTN_ENABLED", "1")))
    sparse_head_gate = bool(int(os.environ.get("SPARSE_HEAD_GATE", "1")))
    gate_window = int(os.environ.get("GATE_WINDOW", 12))
    sparse_gate_scale = float(os.environ.get("SPARSE_GATE_SCALE", 0.5))
    smear_gate_enabled = bool(int(os.environ.get("SMEAR_GATE_ENABLED", "1")))
    bos_id = int(os.environ.get("BOS_ID", 1))
    min_lr = float(os.environ.get("MIN_LR", 0.1))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.026))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.095))
    embed_wd = float(os.environ.get("EMBED_WD", 0.085))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.99))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 80))
    ttt_lora_alpha = float(os.environ.get("TTT_LORA_ALPHA", 144.0))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 1e-4))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 64))
    ttt_eval_seq_len = int(os.environ.get("TTT_EVAL_SEQ_LEN", 2048))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_grad_steps = int(os.environ.get("TTT_GRAD_STEPS", 1))
    ttt_weight_decay = float(os.environ.get("TTT_WEIGHT_DECAY", 0.5))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.0))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.999))
    ttt_k_lora = bool(int(os.environ.get("TTT_K_LORA", "1")))
    ttt_mlp_lora = bool(int(os.environ.get("TTT_MLP_LORA", "1")))
    ttt_o_lora = bool(int(os.environ.get("TTT_O_LORA", "1")))
    ttt_warm_a = bool(int(os.environ.get("TTT_WARM_A", "1")))
    ttt_warm_opt = bool(int(os.environ.get("TTT_WARM_OPT", "1")))
    ttt_time_limit_seconds = float(os.environ.get("TTT_TIME_LIMIT_SECONDS", 460.0))
    phased_ttt_prefix_docs = int(os.environ.get("PHASED_TTT_PREFIX_DOCS", 2500))
    phased_ttt_num_phases = int(os.environ.get("PHASED_TTT_NUM_PHASES", 3))
    global_ttt_lr = float(os.environ.get("GLOBAL_TTT_LR", 1e-3))
    global_ttt_momentum = float(os.environ.get("GLOBAL_TTT_MOMENTUM", 0.9))
    global_ttt_epochs = int(os.environ.get("GLOBAL_TTT_EPOCHS", 1))
    global_ttt_chunk_tokens = int(os.environ.get("GLOBAL_TTT_CHUNK_TOKENS", 32768))
    global_ttt_batch_seqs = int(os.environ.get("GLOBAL_TTT_BATCH_SEQS", 16))
    global_ttt_warmup_chunks = int(os.environ.get("GLOBAL_TTT_WARMUP_CHUNKS", 4))
    global_ttt_grad_clip = float(os.environ.get("GLOBAL_TTT_GRAD_CLIP", 1.0))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 7))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    mlp_clip_sigmas = float(os.environ.get("MLP_CLIP_SIGMAS", 11.5))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 14.0))
    gptq_calibration_batches = int(os.environ.get("GPTQ_CALIBRATION_BATCHES", 16))
    gptq_blocksize = int(os.environ.get("GPTQ_BLOCKSIZE", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    lqer_enabled = bool(int(os.environ.get("LQER_ENABLED", "1")))
    lqer_rank = int(os.environ.get("LQER_RANK", 4))
    lqer_top_k = int(os.environ.get("LQER_TOP_K", 3))
    lqer_group_size = int(os.environ.get("LQER_GROUP_SIZE", 64))
    awq_lite_enabled = bool(int(os.environ.get("AWQ_LITE_ENABLED", "1")))
    awq_lite_group_size = int(os.environ.get("AWQ_LITE_GROUP_SIZE", 64))
    awq_lite_groups = int(os.environ.get("AWQ_LITE_GROUPS", 1))
    compressor = os.environ.get("COMPRESSOR", "pergroup")
    size_limit = 16_000_000
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_main_process = rank == 0
    grad_accum_steps = 8 // world_size
    datasets_dir = os.environ.get("DATA_PATH", os.path.join(data_dir, "datasets", f"fineweb10B_sp{vocab_size}_caseops_v1"))
    train_files = os.path.join(datasets_dir, "fineweb_train_*.bin")
    val_files = os.path.join(datasets_dir, "fineweb_val_[0-9]*.bin")
    val_bytes_files = os.path.join(datasets_dir, "fineweb_val_bytes_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", os.path.join(data_dir, "tokenizers", f"fineweb_{vocab_size}_caseops_v1.model"))
    artifact_dir = os.environ.get("ARTIFACT_DIR", "")
    logfile = os.path.join(artifact_dir, f"{run_id}.txt") if artifact_dir else f"logs/{run_id}.txt"
    model_path = os.path.join(artifact_dir, "final_model.pt") if artifact_dir else "final_model.pt"
    quantized_model_path = os.path.join(artifact_dir, "final_model.int6.ptz") if artifact_dir else "final_model.int6.ptz"


_logger_h = None


def set_logging_hparams(h):
    global _logger_h
    _logger_h = h


def log(msg, console=True):
    if _logger_h is None:
        print(msg)
        return
    if _logger_h.is_main_process:
        if console:
            print(msg)
        if _logger_h.logfile is not None:
            with open(_logger_h.logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)


# ---------------------------------------------------------------- data
_SHARD_HEADER_BYTES = 256 * np.dtype("<i4").itemsize


def load_data_shard(file):
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"bad shard header: {file}")
    num_tokens = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=num_tokens, offset=_SHARD_HEADER_BYTES)
    if tokens.size != num_tokens:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def load_validation_tokens(pattern):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files for {pattern}")
    return torch.cat([load_data_shard(f) for f in files]).contiguous()


def load_validation_byte_sidecar(pattern, expected_len):
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no byte sidecar for {pattern}")
    side = torch.cat([load_data_shard(f) for f in files]).to(torch.int32)
    if side.numel() != expected_len:
        raise ValueError(f"sidecar {side.numel()} entries, stream {expected_len} tokens")
    return side.contiguous()


class ValidationData:
    def __init__(self, h, device):
        self.sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
        if int(self.sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but tokenizer has {int(self.sp.vocab_size())}")
        self.val_tokens = load_validation_tokens(h.val_files)
        # original-text bytes per token (case operators carry 0); written together with the shards
        self.val_bytes = load_validation_byte_sidecar(h.val_bytes_files, self.val_tokens.numel())
        self.total_bytes = int(self.val_bytes[1:].sum(dtype=torch.int64))


def find_docs(tokens, bos_id):
    """(start, length) of every document; the length takes in the next BOS so that it is predicted too."""
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts = [0] + starts
    n = tokens.numel()
    docs = []
    for i, s in enumerate(starts):
        e = starts[i + 1] + 1 if i + 1 < len(starts) else n
        if e - s >= 2:
            docs.append((s, e - s))
    return docs


class DocumentPackingLoader:
    """Packed rows of training documents, with cu_seqlens at every BOS; rank r reads shards r, r+world, ..."""

    def __init__(self, h, device, cu_bucket=64):
        self.h, self.device, self.cu_bucket = h, device, cu_bucket
        all_files = [Path(p) for p in sorted(glob.glob(h.train_files))]
        if not all_files:
            raise FileNotFoundError(f"no training shards for {h.train_files}")
        self.files = all_files[h.rank :: h.world_size] or all_files
        self.rng = random.Random(h.seed + h.rank)
        self.rng.shuffle(self.files)
        self.file_idx = -1
        self._next_shard()

    def _next_shard(self):
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_data_shard(self.files[self.file_idx])
        self.cursor = 0

    def _take(self, n):
        parts, need = [], n
        while need > 0:
            avail = self.tokens.numel() - self.cursor
            if avail <= 1:
                self._next_shard()
                continue
            k = min(avail, need)
            parts.append(self.tokens[self.cursor : self.cursor + k])
            self.cursor += k
            need -= k
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def next_batch(self, global_tokens, grad_accum_steps):
        n = global_tokens // (self.h.world_size * grad_accum_steps)
        buf = self._take(n + 1).to(torch.int64)
        self.cursor = max(self.cursor - 1, 0)
        x, y = buf[:-1], buf[1:]
        cu, max_len = build_cu_seqlens(x, self.h.bos_id, self.h.train_seq_len, self.cu_bucket)
        return (
            x[None].to(self.device, non_blocking=True),
            y[None].to(self.device, non_blocking=True),
            cu.to(self.device, non_blocking=True),
            max_len,
        )


def build_cu_seqlens(x, bos_id, max_len, bucket=64):
    cuts = {0, x.numel()}
    cuts.update((x == bos_id).nonzero(as_tuple=True)[0].tolist())
    edges = sorted(cuts)
    out = [0]
    for a, b in zip(edges[:-1], edges[1:]):
        for c in range(a + max_len, b, max_len):
            out.append(c)
        out.append(b)
    pad = -len(out) % bucket
    out += [x.numel()] * pad
    return torch.tensor(out, dtype=torch.int32), max_len


# ---------------------------------------------------------------- fused softcapped cross entropy
@triton.jit
def _softcap_ce_fwd_kernel(logits_ptr, tgt_ptr, loss_ptr, lse_ptr, stride, V, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    m = -float("inf")
    s = 0.0
    for off in range(0, V, BLOCK):
        c = off + tl.arange(0, BLOCK)
        mask = c < V
        z = tl.load(base + c, mask=mask, other=0.0).to(tl.float32)
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
        z = tl.where(mask, z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), axis=0)
        m = m_new
    lse = m + tl.log(s)
    t = tl.load(tgt_ptr + row)
    zt = tl.load(base + t).to(tl.float32)
    zt = cap * (2.0 * tl.sigmoid(2.0 * zt / cap) - 1.0)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, lse - zt)


@triton.jit
def _softcap_ce_bwd_kernel(logits_ptr, tgt_ptr, lse_ptr, gout_ptr, grad_ptr, stride, V, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    gbase = grad_ptr + row.to(tl.int64) * stride
    lse = tl.load(lse_ptr + row)
    g = tl.load(gout_ptr + row).to(tl.float32)
    t = tl.load(tgt_ptr + row)
    for off in range(0, V, BLOCK):
        c = off + tl.arange(0, BLOCK)
        mask = c < V
        z = tl.load(base + c, mask=mask, other=0.0).to(tl.float32)
        th = 2.0 * tl.sigmoid(2.0 * z / cap) - 1.0
        p = tl.exp(cap * th - lse)
        d = g * (p - tl.where(c == t, 1.0, 0.0)) * (1.0 - th * th)
        tl.store(gbase + c, d.to(grad_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("pg::softcap_ce", mutates_args=())
def softcap_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    rows, V = logits.shape
    loss = torch.empty(rows, device=logits.device, dtype=torch.float32)
    lse = torch.empty_like(loss)
    _softcap_ce_fwd_kernel[(rows,)](logits, targets, loss, lse, logits.stride(0), V, cap, BLOCK=1024, num_warps=8)
    return loss, lse


@softcap_ce_op.register_fake
def _(logits, targets, cap):
    loss = torch.empty(logits.shape[0], device=logits.device, dtype=torch.float32)
    return loss, torch.empty_like(loss)


@torch.library.custom_op("pg::softcap_ce_bwd", mutates_args=())
def softcap_ce_bwd_op(logits: Tensor, targets: Tensor, lse: Tensor, gout: Tensor, cap: float) -> Tensor:
    grad = torch.empty_like(logits)
    _softcap_ce_bwd_kernel[(logits.shape[0],)](
        logits, targets, lse, gout, grad, logits.stride(0), logits.shape[1], cap, BLOCK=1024, num_warps=8
    )
    return grad


@softcap_ce_bwd_op.register_fake
def _(logits, targets, lse, gout, cap):
    return torch.empty_like(logits)


def _softcap_ce_setup(ctx, inputs, output):
    logits, targets, cap = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.cap = cap


def _softcap_ce_backward(ctx, gloss, _glse):
    logits, targets, lse = ctx.saved_tensors
    return softcap_ce_bwd_op(logits, targets, lse, gloss.contiguous(), ctx.cap), None, None


softcap_ce_op.register_autograd(_softcap_ce_backward, setup_context=_softcap_ce_setup)


def softcapped_cross_entropy(logits, targets, cap):
    return softcap_ce_op(logits.contiguous(), targets.reshape(-1), float(cap))[0]


# ---------------------------------------------------------------- model
class RMSNorm(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, base, rope_dims):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims), persistent=False)
        self._cache = None

    def forward(self, seqlen, device, dtype):
        if self._cache is None or self._cache[0].size(1) < seqlen or self._cache[0].device != device:
            f = torch.outer(torch.arange(seqlen, device=device, dtype=torch.float32), self.inv_freq.to(device))
            self._cache = (f.cos()[None, :, None, :], f.sin()[None, :, None, :])
        cos, sin = self._cache
        return cos[:, :seqlen].to(dtype), sin[:, :seqlen].to(dtype)


def apply_rotary_emb(x, cos, sin, rope_dims):
    xr, xp = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = xr[..., :half], xr[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, xp), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.num_heads, self.num_kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        kv_dim = h.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.c_k = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.c_v = CastedLinear(h.model_dim, kv_dim, bias=False)
        self.proj = CastedLinear(h.model_dim, h.model_dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.rope_dims = h.rope_dims
        self.rotary = Rotary(h.rope_base, h.rope_dims)
        self.use_xsa = layer_idx >= h.num_layers - h.xsa_last_n
        self.gated_attn, self.sparse_head_gate = h.gated_attn_enabled, h.sparse_head_gate
        self.gate_window, self.sparse_gate_scale = h.gate_window, h.sparse_gate_scale
        if self.gated_attn:
            self.attn_gate_bias = nn.Parameter(torch.zeros(h.num_heads))
        if self.sparse_head_gate:
            self.attn_gate_w = nn.Parameter(torch.zeros(h.num_heads, h.gate_window))

    def _xsa(self, y, v):
        B, T, H, D = y.shape
        g = y.reshape(B, T, self.num_kv_heads, H // self.num_kv_heads, D)
        vn = F.normalize(v, dim=-1).unsqueeze(-2)
        return (g - (g * vn).sum(-1, keepdim=True) * vn).reshape(B, T, H, D)

    def forward(self, x, cu_seqlens=None, max_seqlen=0, lora=None, rows=None, li=0):
        B, T, C = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q = q + lora.delta("q", li, x, rows)
            v = v + lora.delta("v", li, x, rows)
            if lora.has_k:
                k = k + lora.delta("k", li, x, rows)
        q = q.reshape(B, T, self.num_heads, self.head_dim)
        k = k.reshape(B, T, self.num_kv_heads, self.head_dim)
        v = v.reshape(B, T, self.num_kv_heads, self.head_dim)
        q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(T, x.device, q.dtype)
        q, k = apply_rotary_emb(q, cos, sin, self.rope_dims), apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if cu_seqlens is not None:
            y = flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                                       max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True)[None]
        else:
            y = flash_attn_3_func(q, k, v, causal=True)
        if self.use_xsa:
            y = self._xsa(y, v)
        g = 0.0
        if self.gated_attn:
            g = self.attn_gate_bias.to(x.dtype)
        if self.sparse_head_gate:
            g = g + self.sparse_gate_scale * F.linear(x[..., : self.gate_window], self.attn_gate_w.to(x.dtype))
        if self.gated_attn or self.sparse_head_gate:
            y = y * (2.0 * torch.sigmoid(g)).expand(B, T, self.num_heads)[..., None]
        y = y.reshape(B, T, C)
        out = self.proj(y)
        if lora is not None and lora.has_o:
            out = out + lora.delta("o", li, y, rows)
        return out


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.fc = CastedLinear(h.model_dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, h.model_dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x, lora=None, rows=None, li=0):
        out = self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())
        if lora is not None and lora.has_mlp:
            out = out + lora.delta("mlp", li, x, rows)
        return out


class Block(nn.Module):
    def __init__(self, h, layer_idx):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(h, layer_idx)
        self.mlp = MLP(h)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))).float())
        self.ln_scale_factor = 1.0 / math.sqrt(layer_idx + 1) if h.ln_scale else 1.0

    def forward(self, x, x0, cu, ms, lora, rows, li):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        a = self.attn(self.attn_norm(x) * self.ln_scale_factor, cu, ms, lora, rows, li)
        x = x + self.attn_scale.to(x.dtype) * a
        m = self.mlp(self.mlp_norm(x) * self.ln_scale_factor, lora, rows, li)
        return x + self.mlp_scale.to(x.dtype) * m

    def forward_lanes(self, lane0, lane1, x0, post, resid, cu, ms, lora, rows, li):
        mix = self.resid_mix.to(lane0.dtype)
        r = mix[0] * lane0 + mix[1] * x0
        a = self.attn_scale.to(r.dtype) * self.attn(self.attn_norm(r) * self.ln_scale_factor, cu, ms, lora, rows, li)
        m = self.mlp_scale.to(r.dtype) * self.mlp(self.mlp_norm(lane1) * self.ln_scale_factor, lora, rows, li)
        p, rs = post.to(r.dtype), resid.to(r.dtype)
        return rs[0] * r + p[0, 0] * a + p[1, 0] * m, rs[1] * lane1 + p[0, 1] * a + p[1, 1] * m


class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h
        self.bos_id = h.bos_id
        self.logit_softcap = h.logit_softcap
        self.logit_scale = h.logit_scale
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self.looping_active = False
        if h.num_loops > 0:
            seg = list(range(h.loop_start, h.loop_end + 1))
            idx = list(range(h.loop_start)) + seg * (h.num_loops + 1) + list(range(h.loop_end + 1, h.num_layers))
        else:
            idx = list(range(h.num_layers))
        self.loop_enc, self.loop_dec = idx[: len(idx) // 2], idx[len(idx) // 2 :]
        plain = list(range(h.num_layers))
        self.plain_enc, self.plain_dec = plain[: h.num_layers // 2], plain[h.num_layers // 2 :]
        n_skip = min(len(self.loop_enc), len(self.loop_dec))
        self.skip_weights = nn.Parameter(torch.ones(n_skip, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(n_skip, h.model_dim))
        self.parallel_start_layer = h.parallel_start_layer
        self.parallel_post_lambdas = nn.Parameter(torch.ones(h.num_layers, 2, 2))
        self.parallel_resid_lambdas = nn.Parameter(torch.full((h.num_layers, 2), 1.1 ** 0.5))
        self.smear_gate_enabled = h.smear_gate_enabled
        if h.smear_gate_enabled:
            self.smear_w = nn.Parameter(torch.zeros(1, h.gate_window))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.gate_window = h.gate_window
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.h.tied_embed_init_std)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                if getattr(m, "_zero_init", False):
                    nn.init.zeros_(m.weight)
                elif m.weight.ndim == 2 and min(m.weight.shape) >= 64:
                    nn.init.orthogonal_(m.weight, gain=1.0)

    def _smear(self, x, ids):
        g = self.smear_lambda.to(x.dtype) * torch.sigmoid(F.linear(x[:, 1:, : self.gate_window], self.smear_w.to(x.dtype)))
        keep = (ids[:, 1:] != self.bos_id).to(x.dtype).unsqueeze(-1)
        return torch.cat((x[:, :1], x[:, 1:] + keep * g * x[:, :-1]), dim=1)

    def forward_hidden(self, ids, cu_seqlens=None, max_seqlen=0, lora=None, rows=None):
        x = self.tok_emb(ids).to(torch.bfloat16)
        if self.smear_gate_enabled:
            x = self._smear(x, ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0, skips = x, []
        enc, dec = (self.loop_enc, self.loop_dec) if self.looping_active else (self.plain_enc, self.plain_dec)
        for i in enc:
            x = self.blocks[i](x, x0, cu_seqlens, max_seqlen, lora, rows, i)
            skips.append(x)
        lane0 = lane1 = None
        for j, i in enumerate(dec):
            if j < self.skip_weights.size(0) and skips:
                s = self.skip_weights[j].to(x.dtype) * skips.pop()
                g = torch.sigmoid(self.skip_gates[j].to(x.dtype))
                if lane0 is None:
                    x = torch.lerp(s, x, g)
                else:
                    lane0 = torch.lerp(s, lane0, g)
            if i >= self.parallel_start_layer:
                if lane0 is None:
                    lane0 = lane1 = x
                lane0, lane1 = self.blocks[i].forward_lanes(lane0, lane1, x0, self.parallel_post_lambdas[i],
                                                            self.parallel_resid_lambdas[i], cu_seqlens, max_seqlen, lora, rows, i)
            else:
                x = self.blocks[i](x, x0, cu_seqlens, max_seqlen, lora, rows, i)
        if lane0 is not None:
            x = 0.5 * (lane0 + lane1)
        return F.rms_norm(x, (x.size(-1),))

    def project(self, x, lora=None, rows=None):
        z = F.linear(x, self.tok_emb.weight.to(x.dtype))
        if lora is not None:
            z = z + lora.delta("lm_head", 0, x, rows)
        return z * self.logit_scale

    def forward_logits(self, ids, cu_seqlens=None, max_seqlen=0, lora=None, rows=None):
        z = self.project(self.forward_hidden(ids, cu_seqlens, max_seqlen, lora, rows), lora, rows)
        return self.logit_softcap * torch.tanh(z.float() / self.logit_softcap)

    def forward(self, ids, targets, cu_seqlens=None, max_seqlen=0, reduction="mean"):
        z = self.project(self.forward_hidden(ids, cu_seqlens, max_seqlen))
        loss = softcapped_cross_entropy(z.reshape(-1, z.size(-1)), targets, self.logit_softcap)
        return loss.mean() if reduction == "mean" else loss.reshape(targets.shape)

    def forward_ttt(self, ids, targets, lora, rows):
        z = self.project(self.forward_hidden(ids, None, 0, lora, rows), lora, rows)
        return softcapped_cross_entropy(z.reshape(-1, z.size(-1)), targets, self.logit_softcap).reshape(targets.shape)


# ---------------------------------------------------------------- per-document adapters
class BatchedLinearLoRA(nn.Module):
    def __init__(self, bsz, in_f, out_f, rank, alpha, warm_a):
        super().__init__()
        self._bound, self.scale, self.warm_a = 1.0 / math.sqrt(in_f), alpha / rank, warm_a
        self.A = nn.Parameter(torch.empty(bsz, rank, in_f).uniform_(-self._bound, self._bound))
        self.B = nn.Parameter(torch.zeros(bsz, out_f, rank))

    def reset(self):
        with torch.no_grad():
            if not self.warm_a:
                self.A.uniform_(-self._bound, self._bound)
            self.B.zero_()

    def forward(self, x, rows):
        a, b = self.A[rows].to(x.dtype), self.B[rows].to(x.dtype)
        return (x @ a.transpose(1, 2)) @ b.transpose(1, 2) * self.scale


class BatchedTTTLoRA(nn.Module):
    """One adapter per document of a batch: q, k, v, o, mlp of every layer and the head."""

    def __init__(self, bsz, model, h):
        super().__init__()
        self.bsz, dim = bsz, model.tok_emb.embedding_dim
        self.has_k, self.has_o, self.has_mlp = h.ttt_k_lora, h.ttt_o_lora, h.ttt_mlp_lora
        kv = h.num_kv_heads * (h.model_dim // h.num_heads)
        outs = {"q": dim, "v": kv}
        if self.has_k:
            outs["k"] = kv
        if self.has_o:
            outs["o"] = dim
        if self.has_mlp:
            outs["mlp"] = dim
        mk = lambda o: BatchedLinearLoRA(bsz, dim, o, h.ttt_lora_rank, h.ttt_lora_alpha, h.ttt_warm_a)
        self.layers = nn.ModuleDict({n: nn.ModuleList([mk(o) for _ in model.blocks]) for n, o in outs.items()})
        self.lm_head = mk(model.tok_emb.num_embeddings)

    def delta(self, name, li, x, rows):
        return self.lm_head(x, rows) if name == "lm_head" else self.layers[name][li](x, rows)

    def reset(self):
        for m in self.modules():
            if isinstance(m, BatchedLinearLoRA):
                m.reset()


def build_ttt_optimizer(lora, h):
    return torch.optim.AdamW(lora.parameters(), lr=h.ttt_lora_lr, betas=(h.ttt_beta1, h.ttt_beta2),
                             eps=1e-10, weight_decay=h.ttt_weight_decay, fused=True)


# ---------------------------------------------------------------- optimizers
_PE = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@torch.compile
def zeropower_via_newtonschulz5(G, steps=5):
    X = G.bfloat16()
    t = X.size(0) > X.size(1)
    if t:
        X = X.T
    X = X / (X.norm() * 1.02 + 1e-6)
    for a, b, c in _PE[:steps]:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if t else X


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, backend_steps, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        for g in self.param_groups:
            params = g["params"]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            pos = 0
            for i, p in enumerate(params):
                if i % world == rank and p.grad is not None:
                    st = self.state[p]
                    if "buf" not in st:
                        st["buf"] = torch.zeros_like(p.grad)
                    st["buf"].lerp_(p.grad, 1 - g["momentum"])
                    u = p.grad.lerp(st["buf"], g["momentum"])
                    u = zeropower_via_newtonschulz5(u, g["backend_steps"])
                    flat[pos : pos + p.numel()] = (u * max(1, p.size(0) / p.size(1)) ** 0.5).reshape(-1)
                pos += p.numel()
            if world > 1:
                dist.all_reduce(flat)
            pos = 0
            for p in params:
                if g["weight_decay"] > 0:
                    p.mul_(1 - g["lr"] * g["weight_decay"])
                p.add_(flat[pos : pos + p.numel()].view_as(p).to(p.dtype), alpha=-g["lr"])
                pos += p.numel()


class Optimizers:
    def __init__(self, h, model):
        mats = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and not is_control(n)]
        scal = [p for n, p in model.blocks.named_parameters() if p.ndim != 2 or is_control(n)]
        scal += [p for n, p in model.named_parameters() if not n.startswith(("blocks.", "tok_emb."))]
        self.muon = Muon(mats, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, h.muon_wd)
        kw = dict(betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=True)
        self.tok = torch.optim.AdamW([{"params": [model.tok_emb.weight]}], lr=h.tied_embed_lr, weight_decay=h.embed_wd, **kw)
        self.scalar = torch.optim.AdamW([{"params": scal}], lr=h.scalar_lr, weight_decay=h.adam_wd, **kw)
        self.all = [self.tok, self.muon, self.scalar]
        for o in self.all:
            for g in o.param_groups:
                g["base_lr"] = g["lr"]

    def set_scale(self, s, momentum):
        for o in self.all:
            for g in o.param_groups:
                g["lr"] = g["base_lr"] * s
        for g in self.muon.param_groups:
            g["momentum"] = momentum

    def step(self):
        for o in self.all:
            o.step()

    def zero_grad(self):
        for o in self.all:
            o.zero_grad(set_to_none=True)


CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "parallel_", "attn_gate", "smear")


def is_control(name):
    return any(c in name for c in CONTROL)


def restore_fp32_params(model):
    for n, p in model.named_parameters():
        p.data = p.data.float() if (p.ndim < 2 or is_control(n)) else p.data


# ---------------------------------------------------------------- GPTQ, AWQ-lite, LQER
def collect_hessians(model, loader, h, device, deadline):
    """Sums of x x^T at every quantised matrix over training batches; stops at the deadline."""
    hessians, acts, counts, hooks = {}, {}, {}, []

    def add(name, x):
        x = x.detach().reshape(-1, x.size(-1)).float()
        if name not in hessians:
            hessians[name] = torch.zeros(x.size(1), x.size(1), device=device)
            acts[name] = torch.zeros(x.size(1), device=device)
            counts[name] = torch.zeros((), device=device)
        hessians[name].addmm_(x.T, x)
        acts[name] += x.abs().sum(0)
        counts[name] += x.size(0)

    for n, m in model.named_modules():
        if isinstance(m, CastedLinear):
            hooks.append(m.register_forward_hook(lambda _m, inp, _o, n=n: add(n + ".weight", inp[0])))
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for i in range(h.gptq_calibration_batches):
            x, _, cu, ms = loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            hid = model.forward_hidden(x, cu, ms)
            add("tok_emb.weight", hid)
            torch.cuda.synchronize()
            if time.perf_counter() > deadline:
                log(f"gptq:deadline after {i + 1} batches")
                break
    for hk in hooks:
        hk.remove()
    for n in hessians:
        if h.distributed:
            for t in (hessians[n], acts[n], counts[n]):
                dist.all_reduce(t)
        hessians[n] /= counts[n]
        acts[n] /= counts[n]
    return hessians, acts


def gptq_quantize(w, H, bits, clip_sigmas, block, damp, wide=None):
    """int8 codes and fp16 row scales; the columns of `wide` get 8 bits of range with scales of their own."""
    W = w.float().clone()
    rows, cols = W.shape
    qmax = 2 ** (bits - 1) - 1
    s = (clip_sigmas * W.std(dim=1) / qmax).clamp_min(1e-10).half().float()
    hi8 = torch.zeros(cols, dtype=torch.bool, device=W.device)
    s8 = None
    if wide is not None:
        hi8[wide] = True
        s8 = (W[:, hi8].abs().amax(dim=1) / 127).clamp_min(1e-10).half().float()
    H = H.float().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damp * H.diagonal().mean())
    perm = torch.argsort(H.diagonal(), descending=True)
    inv = torch.argsort(perm)
    W, H, hp = W[:, perm], H[perm][:, perm], hi8[perm]
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W, dtype=torch.int8)
    for i1 in range(0, cols, block):
        i2 = min(i1 + block, cols)
        Wb, Eb, Hb = W[:, i1:i2].clone(), torch.zeros(rows, i2 - i1, device=W.device), Hinv[i1:i2, i1:i2]
        for j in range(i2 - i1):
            sc, lim = (s8, 127) if hp[i1 + j] else (s, qmax)
            q = (Wb[:, j] / sc).round().clamp(-lim, lim)
            Q[:, i1 + j] = q.to(torch.int8)
            err = (Wb[:, j] - q * sc) / Hb[j, j]
            Wb[:, j:] -= err[:, None] * Hb[j, j:][None]
            Eb[:, j] = err
        W[:, i2:] -= Eb @ Hinv[i1:i2, i2:]
    return Q[:, inv], s.half(), None if s8 is None else s8.half()


def dequantize(Q, s, s8, wide):
    W = Q.float() * s.float()[:, None]
    if s8 is not None:
        W[:, wide] = Q[:, wide].float() * s8.float()[:, None]
    return W


def lqer_factors(err, rank, group):
    U, S, V = torch.linalg.svd(err.float(), full_matrices=False)
    A = (U[:, :rank] * S[:rank].sqrt()).reshape(-1)
    B = (S[:rank].sqrt()[:, None] * V[:rank]).reshape(-1)
    out = []
    for t in (A, B):
        pad = -t.numel() % group
        g = F.pad(t, (0, pad)).reshape(-1, group)
        sc = (g.abs().amax(1) / 127).clamp_min(1e-10).half()
        out += [(g / sc.float()[:, None]).round().clamp(-127, 127).to(torch.int8), sc]
    return out


def lqer_restore(a, sa, b, sb, shape, rank):
    A = (a.float() * sa.float()[:, None]).reshape(-1)[: shape[0] * rank].reshape(shape[0], rank)
    B = (b.float() * sb.float()[:, None]).reshape(-1)[: rank * shape[1]].reshape(rank, shape[1])
    return A @ B


def quantize_model(state, hessians, acts, h):
    tensors, meta, errs = {}, {}, {}
    for n, t in state.items():
        t = t.detach()
        if n not in hessians:
            tensors[n + "|p"] = t.half().cpu()
            continue
        emb = n == "tok_emb.weight"
        bits = h.embed_bits if emb else h.matrix_bits
        sig = h.embed_clip_sigmas if emb else (h.mlp_clip_sigmas if ".mlp." in n else h.matrix_clip_sigmas)
        wide = None
        if h.awq_lite_enabled and not emb:
            sal = (acts[n] * t.float().abs().mean(0)).reshape(-1, h.awq_lite_group_size).sum(1)
            top = sal.topk(h.awq_lite_groups).indices
            wide = (top[:, None] * h.awq_lite_group_size + torch.arange(h.awq_lite_group_size, device=t.device)).reshape(-1).sort().values
        Q, s, s8 = gptq_quantize(t, hessians[n], bits, sig, h.gptq_blocksize, h.gptq_damp, wide)
        tensors[n + "|q"], tensors[n + "|s"] = Q.cpu(), s.cpu()
        if wide is not None:
            tensors[n + "|s8"], tensors[n + "|w"] = s8.cpu(), wide.to(torch.int16).cpu()
        errs[n] = t.float() - dequantize(Q, s, s8, wide)
        meta[n] = dict(bits=bits, shape=list(t.shape))
    if h.lqer_enabled:
        gain = {n: (e.square() * hessians[n].diagonal()[None]).sum().item() for n, e in errs.items()}
        for n in sorted(gain, key=gain.get, reverse=True)[: h.lqer_top_k]:
            for k, t in zip(("la", "lsa", "lb", "lsb"), lqer_factors(errs[n], h.lqer_rank, h.lqer_group_size)):
                tensors[f"{n}|{k}"] = t.cpu()
            meta[n]["lqer"] = h.lqer_rank
    log("gptq: " + ", ".join(f"{b}b x{sum(m['bits'] == b for m in meta.values())}" for b in sorted({m["bits"] for m in meta.values()})))
    return tensors, meta


def dequantize_model(tensors, meta, device):
    state = {}
    for key, t in tensors.items():
        n, kind = key.rsplit("|", 1)
        if kind == "p":
            state[n] = t.float().to(device)
        elif kind == "q":
            g = lambda k: tensors[f"{n}|{k}"].to(device) if f"{n}|{k}" in tensors else None
            w = g("w")
            W = dequantize(t.to(device), g("s"), g("s8"), None if w is None else w.long())
            if "lqer" in meta[n]:
                W += lqer_restore(g("la"), g("lsa"), g("lb"), g("lsb"), meta[n]["shape"], meta[n]["lqer"])
            state[n] = W
    return state


# ---------------------------------------------------------------- packing
_DTYPES = {"i8": torch.int8, "f16": torch.float16, "i16": torch.int16}
_DTYPE_NAMES = {v: k for k, v in _DTYPES.items()}


def _lrzip(raw, decompress=False):
    with tempfile.TemporaryDirectory() as d:
        src, dst = os.path.join(d, "a.lrz" if decompress else "a"), os.path.join(d, "b")
        Path(src).write_bytes(raw)
        args = ["lrzip", "-q", "-d", "-o", dst, src] if decompress else ["lrzip", "-q", "-z", "-L", "9", "-o", dst, src]
        subprocess.run(args, check=True)
        return Path(dst).read_bytes()


def _compress_group(raw):
    best = b"B" + brotli.compress(raw, quality=11, lgwin=24)
    if shutil.which("lrzip"):
        alt = b"L" + _lrzip(raw)
        best = min(best, alt, key=len)
    return best


def _decompress_group(buf):
    return brotli.decompress(buf[1:]) if buf[:1] == b"B" else _lrzip(buf[1:], decompress=True)


def _group_of(key):
    n, kind = key.rsplit("|", 1)
    if kind != "q":
        return "misc" if kind == "p" else "side"
    return re.sub(r"\.\d+\.", ".", n)


def pack(tensors, meta):
    groups = collections.defaultdict(list)
    for key in sorted(tensors):
        groups[_group_of(key)].append(key)
    index, blobs = [], []
    for g, keys in groups.items():
        raw = b""
        for k in keys:
            t = tensors[k]
            t2 = t.T if k.endswith("|q") else t
            raw += t2.contiguous().numpy().tobytes()
            index.append([g, k, _DTYPE_NAMES[t.dtype], list(t.shape)])
        blobs.append((g, _compress_group(raw)))
    head = brotli.compress(json.dumps(dict(index=index, meta=meta, groups=[[g, len(b)] for g, b in blobs])).encode(), quality=11)
    return struct.pack("<I", len(head)) + head + b"".join(b for _, b in blobs)


def unpack(buf):
    n = struct.unpack("<I", buf[:4])[0]
    head = json.loads(brotli.decompress(buf[4 : 4 + n]))
    pos, raws = 4 + n, {}
    for g, size in head["groups"]:
        raws[g] = _decompress_group(buf[pos : pos + size])
        pos += size
    off, tensors = collections.Counter(), {}
    for g, k, dt, shape in head["index"]:
        dtype = _DTYPES[dt]
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        t = torch.frombuffer(bytearray(raws[g][off[g] : off[g] + size]), dtype=dtype)
        tensors[k] = t.reshape(shape[::-1]).T.contiguous() if k.endswith("|q") else t.reshape(shape)
        off[g] += size
    return tensors, head["meta"]


def serialize(h, model, hessians, acts):
    code_bytes = len(Path(__file__).read_bytes())
    if h.is_main_process:
        tensors, meta = quantize_model(model.state_dict(), hessians, acts, h)
        blob = pack(tensors, meta)
        Path(h.quantized_model_path).write_bytes(blob)
        total = len(blob) + code_bytes
        log(f"Serialized model quantized+{h.compressor}: {len(blob)} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size quantized+{h.compressor}: {total} bytes")
        if total > h.size_limit:
            raise RuntimeError(f"submission of {total} bytes is over {h.size_limit}")
    if h.distributed:
        dist.barrier()


def deserialize(h, device):
    model = GPT(h).to(device).bfloat16()
    restore_fp32_params(model)
    tensors, meta = unpack(Path(h.quantized_model_path).read_bytes())
    model.load_state_dict(dequantize_model(tensors, meta, device))
    model.looping_active = h.num_loops > 0
    return model


# ---------------------------------------------------------------- evaluation
def _reduce_bpb(h, loss_sum, token_count, byte_sum):
    if h.distributed:
        for t in (loss_sum, token_count, byte_sum):
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
    val_loss = (loss_sum / token_count).item()
    return val_loss, val_loss / math.log(2.0) * (token_count.item() / byte_sum.item())


def eval_val(h, model, val_data, device):
    """Packed documents, every token once, no adaptation: for monitoring."""
    n = val_data.val_tokens.numel()
    acc = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    spans = range(0, n - 1, h.val_batch_tokens // 8)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for s in spans[h.rank :: h.world_size]:
            e = min(s + h.val_batch_tokens // 8, n - 1)
            buf = val_data.val_tokens[s : e + 1].to(torch.int64)
            cu, ms = build_cu_seqlens(buf[:-1], h.bos_id, h.eval_seq_len)
            x, y = buf[None, :-1].to(device), buf[None, 1:].to(device)
            nll = model(x, y, cu.to(device), ms, reduction="none")
            acc[0] += nll.double().sum()
            acc[1] += y.numel()
            acc[2] += val_data.val_bytes[s + 1 : e + 1].sum(dtype=torch.int64).item()
    model.train()
    return _reduce_bpb(h, acc[0], acc[1], acc[2])


def _compute_chunk_window(ci, pred_len, chunk_size, eval_seq_len):
    chunk_start = ci * chunk_size
    chunk_end = min(chunk_start + chunk_size, pred_len)
    win_start = max(0, chunk_end - eval_seq_len)
    return win_start, chunk_end - win_start, chunk_start - win_start, chunk_end - chunk_start


def _build_ttt_global_batches(docs, h):
    """Batches of consecutive documents in stream order; rank r takes batches r, r + world, ..."""
    return [docs[i : i + h.ttt_batch_size] for i in range(0, len(docs), h.ttt_batch_size)]


def _phase_segments(docs, h):
    prefix = min(h.phased_ttt_prefix_docs, len(docs))
    k = max(1, h.phased_ttt_num_phases)
    edges = [prefix * i // k for i in range(k + 1)] + [len(docs)]
    return [(a, b) for a, b in zip(edges[:-1], edges[1:]) if b > a]


def _score_and_adapt_batch(h, batch, val_data, lora, opt, fwd, acc, device, adapt):
    tokens = val_data.val_tokens
    pred_lens = [n - 1 for _, n in batch]
    num_chunks = [(p + h.ttt_chunk_size - 1) // h.ttt_chunk_size for p in pred_lens]
    for ci in range(max(num_chunks)):
        live = [b for b in range(len(batch)) if ci < num_chunks[b]]
        wins = [_compute_chunk_window(ci, pred_lens[b], h.ttt_chunk_size, h.ttt_eval_seq_len) for b in live]
        width = min(h.ttt_eval_seq_len, (ci + 1) * h.ttt_chunk_size)
        x = torch.zeros(len(live), width, dtype=torch.int64)
        y = torch.zeros(len(live), width, dtype=torch.int64)
        mask = torch.zeros(len(live), width, dtype=torch.bool)
        nbytes = 0
        for r, (b, (ws, wl, off, cl)) in enumerate(zip(live, wins)):
            start = batch[b][0] + ws
            seg = tokens[start : start + wl + 1].to(torch.int64)
            x[r, :wl], y[r, :wl] = seg[:-1], seg[1:]
            mask[r, off : off + cl] = True
            nbytes += int(val_data.val_bytes[start + off + 1 : start + off + cl + 1].sum(dtype=torch.int64))
        x, y, mask = x.to(device, non_blocking=True), y.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        rows = torch.tensor(live, device=device)
        needs_train = torch.tensor([float(ci < num_chunks[b] - 1) for b in live], device=device)
        train_now = adapt and bool(needs_train.any().item())
        with torch.set_grad_enabled(train_now), torch.autocast("cuda", dtype=torch.bfloat16):
            per_tok = fwd(x, y, lora, rows)
        scored = per_tok.detach()
        acc[0] += scored[mask].double().sum()
        acc[1] += mask.sum()
        acc[2] += nbytes
        if not train_now:
            continue
        for gi in range(h.ttt_grad_steps):
            if gi > 0:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    per_tok = fwd(x, y, lora, rows)
            per_doc = (per_tok * mask).sum(1) / mask.sum(1).clamp_min(1)
            opt.zero_grad(set_to_none=True)
            (per_doc * needs_train).sum().backward()
            opt.step()


def train_val_ttt_global_sgd_distributed(h, model, val_data, docs, device, phase):
    """One SGD phase over the base weights on documents that every rank has finished scoring."""
    spans = []
    for s, n in docs:
        for o in range(0, n - 1, h.eval_seq_len):
            spans.append((s + o, min(h.eval_seq_len, n - 1 - o)))
    total = sum(n for _, n in spans)
    per = max(1, h.global_ttt_chunk_tokens // h.eval_seq_len)
    chunks = [spans[i : i + per] for i in range(0, len(spans), per)]
    params = list(model.parameters())
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.SGD(params, lr=h.global_ttt_lr, momentum=h.global_ttt_momentum)
    model.train()
    for ep in range(h.global_ttt_epochs):
        for ci, chunk in enumerate(chunks):
            frac = ci / max(1, len(chunks) - 1)
            warm = min(1.0, (ci + 1) / max(1, h.global_ttt_warmup_chunks))
            for g in opt.param_groups:
                g["lr"] = h.global_ttt_lr * warm * 0.5 * (1.0 + math.cos(math.pi * frac))
            opt.zero_grad(set_to_none=True)
            ntok = sum(n for _, n in chunk)
            for s, n in chunk[h.rank :: h.world_size][: h.global_ttt_batch_seqs]:
                buf = val_data.val_tokens[s : s + n + 1].to(torch.int64).to(device)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(buf[None, :-1], buf[None, 1:], reduction="none").sum() / ntok
                loss.backward()
            for p in params:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if h.distributed:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(params, h.global_ttt_grad_clip)
            opt.step()
    for p in params:
        p.requires_grad_(False)
        p.grad = None
    model.eval()
    log(f"ttt_phase:{phase} global_sgd docs:{len(docs)} tokens:{total} chunks:{len(chunks)}")


def eval_val_ttt_phased(h, model, val_data, device, fwd):
    t0 = time.perf_counter()
    docs = find_docs(val_data.val_tokens, h.bos_id)
    segments = _phase_segments(docs, h)
    for p in model.parameters():
        p.requires_grad_(False)
    model.eval()
    torch.manual_seed(h.seed)
    lora = BatchedTTTLoRA(h.ttt_batch_size, model, h).to(device)
    opt = build_ttt_optimizer(lora, h)
    acc = torch.zeros(3, device=device, dtype=torch.float64)
    for si, (lo, hi) in enumerate(segments):
        last = si == len(segments) - 1
        batches = _build_ttt_global_batches(docs[lo:hi], h)
        mine = batches[h.rank :: h.world_size]
        for bi, batch in enumerate(mine):
            lora.reset()
            if not h.ttt_warm_opt:
                opt.state.clear()
            adapt = time.perf_counter() - t0 < h.ttt_time_limit_seconds
            _score_and_adapt_batch(h, batch, val_data, lora, opt, fwd, acc, device, adapt)
            if bi % 16 == 0 and acc[2].item() > 0:
                run = acc[0].item() / math.log(2.0) / acc[2].item()
                log(f"ttp: seg{si} b{bi + 1}/{len(mine)} running_bpb:{run:.5f} t:{time.perf_counter() - t0:.1f}s")
        if h.distributed:
            dist.barrier()
        if not last:
            over = torch.tensor(float(time.perf_counter() - t0 > h.ttt_time_limit_seconds), device=device)
            if h.distributed:
                dist.all_reduce(over)
            if over.item() == 0:
                train_val_ttt_global_sgd_distributed(h, model, val_data, docs[lo:hi], device, si + 1)
    val_loss, val_bpb = _reduce_bpb(h, acc[0], acc[1], acc[2])
    if int(acc[1].item()) != val_data.val_tokens.numel() - 1 or int(acc[2].item()) != val_data.total_bytes:
        raise RuntimeError(f"scored {int(acc[1].item())} tokens, {int(acc[2].item())} bytes of {val_data.total_bytes}")
    log(f"ttt_phased: docs:{len(docs)} scored_tokens:{int(acc[1].item())} bytes:{int(acc[2].item())}")
    return val_loss, val_bpb


def warmup_ttt(h, model, device):
    """Compiles the TTT forward and backward on random tokens; the adapter is thrown away."""
    lora = BatchedTTTLoRA(h.ttt_batch_size, model, h).to(device)
    opt = build_ttt_optimizer(lora, h)
    fwd = torch.compile(model.forward_ttt, dynamic=True)
    for p in model.parameters():
        p.requires_grad_(False)
    gen = torch.Generator(device=device).manual_seed(0)
    for n, w in ((h.ttt_batch_size, h.ttt_chunk_size), (h.ttt_batch_size, h.ttt_eval_seq_len), (3, h.ttt_eval_seq_len)):
        x = torch.randint(0, h.vocab_size, (n, w), device=device, generator=gen)
        y = torch.randint(0, h.vocab_size, (n, w), device=device, generator=gen)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = fwd(x, y, lora, torch.arange(n, device=device))
        out[:, -h.ttt_chunk_size :].mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    del lora, opt
    torch.cuda.empty_cache()
    return fwd


def timed_eval(label, fn, *args):
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = fn(*args)
    torch.cuda.synchronize()
    log(f"{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} eval_time:{1e3 * (time.perf_counter() - t0):.0f}ms")
    return val_loss, val_bpb


# ---------------------------------------------------------------- training
def train_model(h, device, val_data):
    base_model = GPT(h).to(device).bfloat16()
    restore_fp32_params(base_model)
    model = torch.compile(base_model, dynamic=False, fullgraph=True)
    log(f"model_params:{sum(p.numel() for p in base_model.parameters())}")
    optimizers = Optimizers(h, base_model)
    train_loader = DocumentPackingLoader(h, device)
    max_wallclock_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
    log(f"gptq:reserving {h.gptq_reserve_seconds:.1f}s, effective={max_wallclock_ms:.0f}ms")

    def training_frac(step, elapsed_ms):
        return max(step / max(h.iterations, 1), elapsed_ms / max(max_wallclock_ms, 1e-9))

    def lr_mul(frac):
        if frac >= 1.0 - h.warmdown_frac:
            return max((1.0 - frac) / h.warmdown_frac, h.min_lr)
        return 1.0

    def step_fn(step, lr_scale):
        train_loss = torch.zeros((), device=device)
        for _ in range(h.grad_accum_steps):
            x, y, cu, ms = train_loader.next_batch(h.train_batch_tokens, h.grad_accum_steps)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y, cu, ms)
            train_loss += loss.detach() / h.grad_accum_steps
            (loss / h.grad_accum_steps).backward()
        if h.distributed:
            for p in base_model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        f = min(step / max(h.muon_momentum_warmup_steps, 1), 1.0)
        optimizers.set_scale(lr_scale, (1 - f) * h.muon_momentum_warmup_start + f * h.muon_momentum)
        if h.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), h.grad_clip_norm)
        optimizers.step()
        optimizers.zero_grad()
        return train_loss

    if h.warmup_steps > 0:
        init_state = {n: t.detach().cpu().clone() for n, t in base_model.state_dict().items()}
        for loop in (False, True):
            base_model.looping_active = loop and h.num_loops > 0
            for ws in range(h.warmup_steps):
                step_fn(ws, 1.0)
        base_model.looping_active = False
        base_model.load_state_dict(init_state, strict=True)
        optimizers = Optimizers(h, base_model)
        train_loader = DocumentPackingLoader(h, device)
        log(f"warmup: {2 * h.warmup_steps} compile steps, weights and loader restored")

    ema_state = {n: t.detach().float().clone() for n, t in base_model.state_dict().items()}
    training_time_ms, stop_after_step = 0.0, None
    if h.distributed:
        dist.barrier()
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == h.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (h.val_loss_every > 0 and step > 0 and step % h.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            if not last_step:
                val_loss, val_bpb = eval_val(h, base_model, val_data, device)
                log(f"{step}/{h.iterations} val_loss: {val_loss:.4f} val_bpb: {val_bpb:.4f}")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break
        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        frac = training_frac(step, elapsed_ms)
        if h.num_loops > 0 and not base_model.looping_active and frac >= h.enable_looping_at:
            base_model.looping_active = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} enc:{base_model.loop_enc} dec:{base_model.loop_dec}")
        train_loss = step_fn(step, lr_mul(frac))
        with torch.no_grad():
            for n, t in base_model.state_dict().items():
                ema_state[n].mul_(h.ema_decay).add_(t.detach().float(), alpha=1.0 - h.ema_decay)
        step += 1
        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if step <= 5 or step % h.train_log_every == 0:
            log(f"{step}/{h.iterations} train_loss: {train_loss.item():.4f} train_time: {approx_ms / 60000:.1f}m")
        capped = torch.tensor(int(approx_ms >= max_wallclock_ms), device=device)
        if h.distributed:
            dist.all_reduce(capped, op=dist.ReduceOp.MAX)
        if stop_after_step is None and capped.item():
            stop_after_step = step
    log(f"stopping_early: train_time: {training_time_ms:.0f}ms step: {step}/{h.iterations}")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    cur = base_model.state_dict()
    base_model.load_state_dict({n: t.to(cur[n].dtype) for n, t in ema_state.items()}, strict=True)
    log("ema:applied")
    # calibration reads training batches inside the reserve, before the 600 s are over
    deadline = t0 + (h.max_wallclock_seconds * 1000.0 - training_time_ms) / 1000.0 - 1.0
    hessians, acts = collect_hessians(base_model, train_loader, h, device, deadline)
    torch.cuda.synchronize()
    training_time_ms += 1000.0 * (time.perf_counter() - t0)
    log(f"gptq:hessians for {len(hessians)} matrices, train+calibration {training_time_ms:.0f}ms")
    return base_model, hessians, acts


def train_and_eval(h, device):
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    val_data = ValidationData(h, device)
    log(f"train_shards: {len(glob.glob(h.train_files))} val_tokens: {val_data.val_tokens.numel()} val_bytes: {val_data.total_bytes}")
    base_model, hessians, acts = train_model(h, device, val_data)
    torch._dynamo.reset()
    timed_eval("diagnostic pre-quantization post-ema", eval_val, h, base_model, val_data, device)
    serialize(h, base_model, hessians, acts)
    del base_model, hessians, acts
    eval_model = deserialize(h, device)
    t_eval = time.perf_counter()
    timed_eval("diagnostic quantized", eval_val, h, eval_model, val_data, device)
    if not h.ttt_enabled:
        return
    fwd = warmup_ttt(h, eval_model, device)
    val_loss, val_bpb = timed_eval("quantized_ttt_phased", eval_val_ttt_phased, h, eval_model, val_data, device, fwd)
    log(f"total_eval_time:{time.perf_counter() - t_eval:.1f}s")
    log(f"final_ttt_phased_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")


def main():
    h = Hyperparameters()
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
    torch._dynamo.config.cache_size_limit = 64
    os.makedirs(os.path.dirname(h.logfile) or ".", exist_ok=True)
    set_logging_hparams(h)
    log("Hyperparameters:")
    for k in sorted(n for n in dir(h) if not n.startswith("_")):
        log(f"  {k}: {getattr(h, k)}", console=False)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version} PyTorch {torch.__version__} triton {triton.__version__}", console=False)
    train_and_eval(h, device)
    if h.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
