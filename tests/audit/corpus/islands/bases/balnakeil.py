"""
balnakeil: 10L/512 baseline-line transformer + online backoff n-gram mixer + chunked score-first LoRA TTT.

Order of things:
  1. train for the wall clock (Muon + AdamW, EMA in the last part), leave a reserve for GPTQ
  2. GPTQ with Hessians from training batches: int5 for the MLPs, int6 for attention, int8 for the tables
  3. brotli, size printed, model read back from the file
  4. evaluation, chunk by chunk, all ranks on the same chunk:
       score the chunk (LM + n-gram distribution, both over the whole vocabulary) -> add the chunk to the tables -> LoRA steps on it
Run: torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# SETTINGS
# -----------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # schedule
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 250))
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 18.0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 10))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 32))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 3072))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 96))

    # optimizer
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_steps = int(os.environ.get("MUON_MOMENTUM_STEPS", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.01))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # quantisation
    gptq_batches = int(os.environ.get("GPTQ_BATCHES", 24))
    gptq_batch_seqs = int(os.environ.get("GPTQ_BATCH_SEQS", 8))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    mlp_bits = int(os.environ.get("MLP_BITS", 5))
    attn_bits = int(os.environ.get("ATTN_BITS", 6))
    table_bits = int(os.environ.get("TABLE_BITS", 8))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int56.ptb")
    size_limit = 16_000_000

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 512))
    eval_batch_segs = int(os.environ.get("EVAL_BATCH_SEGS", 32))
    eval_budget_s = float(os.environ.get("EVAL_BUDGET_S", 540.0))
    chunk_tokens = int(os.environ.get("CHUNK_TOKENS", 131_072))

    # n-gram mixer (the constants were picked on the last training shard)
    ngram_enabled = bool(int(os.environ.get("NGRAM", "1")))
    ngram_min_order = 3  # orders 1 and 2 are dense arrays
    ngram_max_order = int(os.environ.get("NGRAM_MAX_ORDER", 7))
    ngram_row_bits = int(os.environ.get("NGRAM_ROW_BITS", 21))
    ngram_slots = int(os.environ.get("NGRAM_SLOTS", 16))
    alpha_min = float(os.environ.get("ALPHA_MIN", 0.02))
    alpha_max = float(os.environ.get("ALPHA_MAX", 0.38))
    alpha_slope = float(os.environ.get("ALPHA_SLOPE", 1.6))
    alpha_mid = float(os.environ.get("ALPHA_MID", 3.1))
    alpha_depth_gain = float(os.environ.get("ALPHA_DEPTH_GAIN", 0.12))

    # test-time training
    ttt_enabled = bool(int(os.environ.get("TTT", "1")))
    ttt_rank = int(os.environ.get("TTT_RANK", 8))
    ttt_lr = float(os.environ.get("TTT_LR", 8e-4))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 2))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 4))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.9))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.99))
    ttt_clip = float(os.environ.get("TTT_CLIP", 1.0))


BOS_ID = 1
CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram.gain")

# -----------------------------
# RANKS AND LOG
# -----------------------------


class Ranks:
    """Where this process stands; a run without torchrun is one rank of one."""

    def __init__(self) -> None:
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        self.device = torch.device("cuda", self.local)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        return tensor

    def any(self, flag: bool) -> bool:
        box = torch.tensor(int(flag), device=self.device)
        if self.distributed:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return bool(box.item())

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()


class Log:
    def __init__(self, ranks: Ranks, run_id: str) -> None:
        self.master = ranks.master
        self.path = Path("logs") / f"{run_id}.txt"
        if self.master:
            self.path.parent.mkdir(exist_ok=True)
            print(self.path)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            print(text, file=f)


# -----------------------------
# OPTIMIZER
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
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
    """Matrices are dealt out over the ranks, orthogonalised there and summed back."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay, nesterov=True)
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            lr, momentum = group["lr"], group["momentum"]
            total = sum(int(p.numel()) for p in params)
            flat = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(p.grad)
                    g = p.grad.add(buf, alpha=momentum) if group["nesterov"] else buf
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(dtype=p.dtype)
                p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(g, alpha=-lr)
                cursor += p.numel()


# -----------------------------
# TOKENIZER BYTES
# -----------------------------
# bpb = bits / UTF-8 bytes of the original text. A piece's bytes are those of its text; the leading mark stands for one
# space, which is only there if the token before is not a boundary (BOS, control, unknown, unused).


def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
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
        if piece.startswith("▁"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


class ByteCounter:
    """Bytes of target tokens, given the tokens before them."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> None:
        self.base, self.space, self.boundary = build_sentencepiece_luts(sp, vocab_size, device)

    def __call__(self, prev_ids: Tensor, tgt_ids: Tensor) -> Tensor:
        n = self.base[tgt_ids].to(torch.int64)
        n += (self.space[tgt_ids] & ~self.boundary[prev_ids]).to(torch.int64)
        return n.sum()


# -----------------------------
# DATA
# -----------------------------

SHARD_MAGIC = 20240520


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header: {file}")
    num_tokens = int(header[2])
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files for {pattern}")
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    """Reads the shards in order, forever."""

    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"no files for {pattern}")
        self.file_idx = 0
        self.tokens = load_data_shard(self.files[0])
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
    """Each call takes one contiguous span for all ranks; a rank keeps its own slice."""

    def __init__(self, pattern: str, ranks: Ranks):
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int, grad_accum_steps: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.world * grad_accum_steps)
        per_rank_span = local_tokens + 1
        chunk = self.stream.take(per_rank_span * self.world)
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


class CastedLinear(nn.Linear):
    """fp32 weights, computed in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    """Rotates the first `dims` of each head, leaves the rest without position."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.dims = dims
        self._seq_len = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._seq_len != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None, :, :]
            self._sin = freqs.sin()[None, None, :, :]
            self._seq_len = seq_len
        return self._cos.to(dtype=dtype), self._sin.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    rot, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim = args.model_dim
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.rope_dims = min(args.rope_dims, self.head_dim)
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, args.rope_base)

    def forward(self, x: Tensor, dq: Tensor | None = None, dv: Tensor | None = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x)
        v = self.c_v(x)
        if dq is not None and dv is not None:
            q = q + dq
            v = v + dv
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mlp_mult * dim, bias=False)
        self.proj = CastedLinear(mlp_mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), negative_slope=0.5).square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(args)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, adapter: nn.Module | None = None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x) * self.depth_scale
        dq, dv = adapter(n) if adapter is not None else (None, None)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(n, dq, dv)
        x = x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x) * self.depth_scale)
        return x


class BigramEmbedding(nn.Module):
    """A small hashed embedding of (previous token, token); both are inputs of the position."""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.table = nn.Embedding(buckets, dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.up = CastedLinear(dim, model_dim, bias=False)
        self.up._zero_init = True
        self.gain = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=0)
        prev = prev.masked_fill(ids == BOS_ID, 0)  # nothing of the document before
        h = (prev * 36313 + ids * 27191) % (self.buckets - 1) + 1
        return self.up(self.table(h)) * self.gain


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        num_skips = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(num_skips, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=0.005)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= 64:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor, adapters: nn.ModuleList | None = None) -> Tensor:
        x = self.tok_emb(ids) + self.bigram(ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0, adapters[i] if adapters is not None else None)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            j = self.num_encoder_layers + i
            x = self.blocks[j](x, x0, adapters[j] if adapters is not None else None)
        return self.final_norm(x)

    def head(self, h: Tensor) -> Tensor:
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), reduction="mean")


class LoraQV(nn.Module):
    """Low-rank deltas of one block's query and value projections; zero at first."""

    def __init__(self, dim: int, kv_dim: int, rank: int):
        super().__init__()
        self.a_q = nn.Parameter(torch.randn(rank, dim) / math.sqrt(dim))
        self.b_q = nn.Parameter(torch.zeros(dim, rank))
        self.a_v = nn.Parameter(torch.randn(rank, dim) / math.sqrt(dim))
        self.b_v = nn.Parameter(torch.zeros(kv_dim, rank))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dq = F.linear(F.linear(x, self.a_q.to(x.dtype)), self.b_q.to(x.dtype))
        dv = F.linear(F.linear(x, self.a_v.to(x.dtype)), self.b_v.to(x.dtype))
        return dq, dv


def build_adapters(args: Hyperparameters, device: torch.device) -> nn.ModuleList:
    kv_dim = args.num_kv_heads * (args.model_dim // args.num_heads)
    gen_state = torch.random.get_rng_state()
    torch.manual_seed(args.seed + 77)  # the same deltas on every rank
    adapters = nn.ModuleList([LoraQV(args.model_dim, kv_dim, args.ttt_rank) for _ in range(args.num_layers)])
    torch.random.set_rng_state(gen_state)
    return adapters.to(device)


# -----------------------------
# AVERAGE
# -----------------------------


class EMA:
    """An exponential average of the weights, kept in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].lerp_(t.detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        state = {name: self.shadow[name].to(dtype=t.dtype) for name, t in model.state_dict().items()}
        model.load_state_dict(state, strict=True)


# -----------------------------
# QUANTISATION
# -----------------------------


def bits_for(args: Hyperparameters, name: str) -> int:
    if ".mlp." in name:
        return args.mlp_bits
    if ".attn." in name:
        return args.attn_bits
    return args.table_bits


@torch.no_grad()
def collect_hessians(args: Hyperparameters, model: GPT, loader: DistributedTokenLoader, ranks: Ranks) -> dict[str, Tensor]:
    """X^T X of the input of every linear of the blocks, over batches of the given loader."""
    hessians: dict[str, Tensor] = {}
    hooks = []

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            hessians[name].addmm_(x.T, x, beta=1.0, alpha=1.0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear) and name.startswith("blocks."):
            n = module.weight.size(1)
            hessians[f"{name}.weight"] = torch.zeros(n, n, device=ranks.device, dtype=torch.float32)
            hooks.append(module.register_forward_hook(hook_for(f"{name}.weight")))
    model.eval()
    span = args.gptq_batch_seqs * args.train_seq_len * ranks.world
    for _ in range(max(1, args.gptq_batches // ranks.world)):
        x, _ = loader.next_batch(span, args.train_seq_len, 1)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            model.hidden(x)
    for hook in hooks:
        hook.remove()
    for name in hessians:
        ranks.sum_(hessians[name])
    return hessians


def row_scales(weight: Tensor, qmax: int) -> Tensor:
    """Per row the clipping, out of five, with the least squared rounding error."""
    top = weight.abs().amax(dim=1).clamp_min(1e-8)
    best = torch.full_like(top, float("inf"))
    scale = top / qmax
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8):
        s = top * clip / qmax
        q = (weight / s[:, None]).round().clamp(-qmax - 1, qmax)
        err = (q * s[:, None] - weight).square().sum(dim=1)
        better = err < best
        best = torch.where(better, err, best)
        scale = torch.where(better, s, scale)
    return scale.half().float()


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2 ** (bits - 1) - 1
    w = weight.float()
    scale = row_scales(w, qmax)
    q = (w / scale[:, None]).round().clamp(-qmax - 1, qmax)
    return q.to(torch.int8), scale.half()


def gptq_quantize(weight: Tensor, hessian: Tensor, bits: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Column by column, the rounding error of a column is pushed into the columns after it."""
    qmax = 2 ** (bits - 1) - 1
    W = weight.float().clone()
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(H.diagonal(), descending=True)
    W, H = W[:, order], H[order][:, order]
    scale = row_scales(W, qmax)
    H.diagonal().add_(damp * H.diagonal().mean())
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(Hinv, upper=True)
    Q = torch.zeros_like(W)
    cols = W.size(1)
    for lo in range(0, cols, block):
        hi = min(lo + block, cols)
        Wb = W[:, lo:hi].clone()
        Eb = torch.zeros_like(Wb)
        Ub = U[lo:hi, lo:hi]
        for i in range(hi - lo):
            w = Wb[:, i]
            q = (w / scale).round().clamp(-qmax - 1, qmax)
            Q[:, lo + i] = q
            err = (w - q * scale) / Ub[i, i]
            Wb[:, i:] -= err[:, None] * Ub[i, i:][None, :]
            Eb[:, i] = err
        W[:, hi:] -= Eb @ U[lo:hi, hi:]
    back = torch.argsort(order)
    return Q[:, back].to(torch.int8), scale.half()


@torch.no_grad()
def quantize_model(args: Hyperparameters, model: GPT, hessians: dict[str, Tensor], ranks: Ranks) -> dict[str, dict]:
    """Every tensor of the model in its packed form. The matrices are shared out over the ranks."""
    state = {name: t.detach() for name, t in model.state_dict().items()}
    packed: dict[str, dict] = {"q": {}, "scale": {}, "plain": {}}
    matrices = [name for name in state if name in hessians]
    for i, name in enumerate(matrices):
        w = state[name]
        if i % ranks.world == ranks.rank:
            q, s = gptq_quantize(w, hessians[name], bits_for(args, name), args.gptq_block, args.gptq_damp)
        else:
            q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
            s = torch.empty(w.size(0), dtype=torch.float16, device=w.device)
        packed["q"][name], packed["scale"][name] = q.contiguous(), s.contiguous()
    if ranks.distributed:
        for i, name in enumerate(matrices):
            dist.broadcast(packed["q"][name], src=i % ranks.world)
            dist.broadcast(packed["scale"][name], src=i % ranks.world)
    for name, t in state.items():
        if name in packed["q"]:
            continue
        if t.ndim == 2 and t.numel() > 16_384 and not any(p in name for p in CONTROL_PATTERNS):
            packed["q"][name], packed["scale"][name] = quantize_rows(t, bits_for(args, name))
        else:
            packed["plain"][name] = t.half() if t.is_floating_point() else t
    return {kind: {name: t.cpu() for name, t in tensors.items()} for kind, tensors in packed.items()}


def pack_model(packed: dict[str, dict]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return brotli.compress(buf.getvalue(), quality=11, lgwin=24)


def unpack_model(blob: bytes) -> dict[str, Tensor]:
    packed = torch.load(io.BytesIO(brotli.decompress(blob)), map_location="cpu", weights_only=True)
    state = {name: t.float() if t.is_floating_point() else t for name, t in packed["plain"].items()}
    for name, q in packed["q"].items():
        state[name] = q.float() * packed["scale"][name].float()[:, None]
    return state


def new_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


# -----------------------------
# N-GRAM TABLES
# -----------------------------
# Orders 1 and 2 are dense counts. An order n >= 3 has 2^bits rows of `slots` (token, count) pairs; the row is a hash of the
# n-1 tokens before the position. Rows that share a hash share their counts, which only makes the row's distribution worse:
# it is divided by the sum of its own counts. Witten-Bell backoff,
#   p_n(v) = (c_n(v) + D_n p_{n-1}(v)) / (N_n + D_n),   N_n = sum_v c_n(v),  D_n = number of v with c_n(v) > 0,
# so that sum_v p_n(v) = 1 follows from sum_v p_{n-1}(v) = 1.


class NgramTables:
    PRIMES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB)

    def __init__(self, args: Hyperparameters) -> None:
        self.vocab = args.vocab_size
        self.bits = args.ngram_row_bits
        self.slots = args.ngram_slots
        self.orders = list(range(args.ngram_min_order, args.ngram_max_order + 1))
        self.pad = args.ngram_max_order
        self.uni = np.zeros(self.vocab, dtype=np.int64)
        self.bi = np.zeros((self.vocab, self.vocab), dtype=np.int32)
        self.tok = {n: np.zeros((1 << self.bits, self.slots), dtype=np.uint16) for n in self.orders}
        self.cnt = {n: np.zeros((1 << self.bits, self.slots), dtype=np.uint16) for n in self.orders}
        self.seen = 0

    def padded(self, tokens: Tensor) -> np.ndarray:
        """The token stream with a pad in front: position t of the stream is element t + pad."""
        flat = tokens.to(torch.int64).numpy()
        return np.concatenate((np.zeros(self.pad, dtype=np.int64), flat))

    def rows(self, stream: np.ndarray, positions: np.ndarray, n: int) -> np.ndarray:
        """Row of order n for each position: a hash of the n-1 tokens before it."""
        h = np.full(positions.shape, n, dtype=np.uint64)
        at = positions + self.pad
        for j in range(1, n):
            h ^= (stream[at - j].astype(np.uint64) + np.uint64(1)) * np.uint64(self.PRIMES[j - 1])
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return (h >> np.uint64(64 - self.bits)).astype(np.int64)

    def lookup(self, stream: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Previous token [P], slot tokens [P, orders, slots] and slot counts of the contexts of these positions."""
        prev = stream[positions + self.pad - 1]
        toks = np.empty((positions.size, len(self.orders), self.slots), dtype=np.int64)
        cnts = np.empty((positions.size, len(self.orders), self.slots), dtype=np.float32)
        for i, n in enumerate(self.orders):
            r = self.rows(stream, positions, n)
            toks[:, i] = self.tok[n][r]
            cnts[:, i] = self.cnt[n][r]
        return prev, toks, cnts

    def absorb(self, stream: np.ndarray, lo: int, hi: int) -> None:
        """Counts the tokens at positions lo .. hi-1, each under the contexts before it."""
        positions = np.arange(lo, hi, dtype=np.int64)
        target = stream[positions + self.pad]
        prev = stream[positions + self.pad - 1]
        self.uni += np.bincount(target, minlength=self.vocab)
        np.add.at(self.bi, (prev, target), 1)
        for n in self.orders:
            self._absorb_order(n, self.rows(stream, positions, n), target)
        self.seen += hi - lo

    def _absorb_order(self, n: int, rows: np.ndarray, target: np.ndarray) -> None:
        pairs, times = np.unique(rows * self.vocab + target, return_counts=True)
        row, tgt = pairs // self.vocab, pairs % self.vocab
        tok, cnt = self.tok[n], self.cnt[n]
        while row.size:  # each round takes one pair of every row
            first = np.ones(row.size, dtype=bool)
            first[1:] = row[1:] != row[:-1]
            r, t, c = row[first], tgt[first], times[first]
            have = cnt[r]
            hit = (tok[r] == t[:, None]) & (have > 0)
            known = hit.any(axis=1)
            slot = np.where(known, hit.argmax(axis=1), have.argmin(axis=1))
            before = np.where(known, have[np.arange(r.size), slot].astype(np.int64), 0)
            tok[r, slot] = t
            cnt[r, slot] = np.minimum(before + c, 65535)
            row, tgt, times = row[~first], tgt[~first], times[~first]


class NgramMixer:
    """Turns looked-up counts into a distribution over the vocabulary and mixes it with the model's."""

    def __init__(self, args: Hyperparameters, tables: NgramTables, device: torch.device) -> None:
        self.args = args
        self.tables = tables
        self.device = device
        self.vocab = args.vocab_size
        self.refresh()

    def refresh(self) -> None:
        """Uploads the dense orders; called after the tables have absorbed a chunk."""
        uni = torch.from_numpy(self.tables.uni).to(self.device, torch.float32)
        self.p1 = (uni + 1.0) / (uni.sum() + self.vocab)
        self.bi = torch.from_numpy(self.tables.bi).to(self.device, torch.float32)

    @staticmethod
    def backoff(counts: Tensor, lower: Tensor) -> Tensor:
        total = counts.sum(dim=-1, keepdim=True)
        kinds = (counts > 0).sum(dim=-1, keepdim=True).clamp_min(1).to(counts.dtype)
        return (counts + kinds * lower) / (total + kinds)

    def distribution(self, stream: np.ndarray, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """p [P, V] of the n-gram model, and the number of orders >= 3 whose context has been seen [P]."""
        prev, toks, cnts = self.tables.lookup(stream, positions)
        prev_t = torch.from_numpy(prev).to(self.device)
        toks_t = torch.from_numpy(toks).to(self.device)
        cnts_t = torch.from_numpy(cnts).to(self.device)
        p = self.backoff(self.bi[prev_t], self.p1.expand(positions.size, self.vocab))
        for i in range(len(self.tables.orders)):
            counts = torch.zeros_like(p).scatter_add_(1, toks_t[:, i], cnts_t[:, i])
            p = self.backoff(counts, p)
        depth = (cnts_t.sum(dim=-1) > 0).sum(dim=-1)
        return p, depth

    def alpha(self, p_lm: Tensor, depth: Tensor) -> Tensor:
        """Weight of the n-gram model: grows with the LM's entropy and with the length of the context that was found."""
        a = self.args
        entropy = -(p_lm * p_lm.clamp_min(1e-12).log()).sum(dim=-1)
        gate = torch.sigmoid(a.alpha_slope * (entropy - a.alpha_mid) + a.alpha_depth_gain * depth.to(entropy.dtype))
        return a.alpha_min + (a.alpha_max - a.alpha_min) * gate

    def mix(self, logits: Tensor, stream: np.ndarray, positions: np.ndarray) -> Tensor:
        """log p [P, V] of the mixture."""
        p_lm = torch.softmax(logits.float(), dim=-1)
        p_ng, depth = self.distribution(stream, positions)
        weight = self.alpha(p_lm, depth)[:, None]
        return ((1.0 - weight) * p_lm + weight * p_ng).clamp_min(1e-12).log()


# -----------------------------
# EVALUATION
# -----------------------------


class Ledger:
    """Sums of what was scored on this rank; all_reduced once at the end."""

    def __init__(self, device: torch.device) -> None:
        self.nll = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.bytes = torch.zeros((), device=device, dtype=torch.float64)

    def add(self, nll: Tensor, num_bytes: Tensor) -> None:
        self.nll += nll.to(torch.float64).sum()
        self.tokens += nll.numel()
        self.bytes += num_bytes.to(torch.float64)

    def result(self, ranks: Ranks) -> tuple[float, float, int]:
        """Loss in nats per token, bits per byte, tokens."""
        sums = ranks.sum_(torch.stack((self.nll, self.tokens, self.bytes)))
        nll, tokens, num_bytes = (float(v) for v in sums)
        return nll / tokens, nll / math.log(2.0) / num_bytes, int(tokens)


@torch.no_grad()
def eval_plain(
    args: Hyperparameters, model: GPT, val_tokens: Tensor, count_bytes: ByteCounter, ranks: Ranks
) -> tuple[float, float, int]:
    """Side by side windows, model alone. For the log during training and after the round trip."""
    model.eval()
    ledger = Ledger(ranks.device)
    seq = args.eval_seq_len
    total = val_tokens.numel() - 1
    starts = list(range(0, total, seq))[ranks.rank :: ranks.world]
    for i in range(0, len(starts), 16):
        group = starts[i : i + 16]
        ids = torch.zeros(len(group), seq, dtype=torch.int64)
        tgt = torch.zeros(len(group), seq, dtype=torch.int64)
        keep = torch.zeros(len(group), seq, dtype=torch.bool)
        for j, s in enumerate(group):
            n = min(seq, total - s)
            ids[j, :n] = val_tokens[s : s + n]
            tgt[j, :n] = val_tokens[s + 1 : s + n + 1]
            keep[j, :n] = True
        ids, tgt, keep = ids.to(ranks.device), tgt.to(ranks.device), keep.to(ranks.device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            logits = model.head(model.hidden(ids))
        nll = F.cross_entropy(logits.float().transpose(1, 2), tgt, reduction="none")[keep]
        ledger.add(nll, count_bytes(ids[keep], tgt[keep]))
    model.train()
    return ledger.result(ranks)


def chunk_bounds(total: int, size: int) -> list[tuple[int, int]]:
    return [(lo, min(lo + size, total)) for lo in range(0, total, size)]


def segments_of(lo: int, hi: int, stride: int) -> list[tuple[int, int]]:
    """Input positions lo .. hi-1 cut into pieces; position i predicts token i+1, and is in one piece only."""
    return [(s, min(s + stride, hi)) for s in range(lo, hi, stride)]


@torch.no_grad()
def score_segments(
    args: Hyperparameters,
    hidden,
    model: GPT,
    adapters: nn.ModuleList,
    mixer: NgramMixer | None,
    val_tokens: Tensor,
    stream: np.ndarray | None,
    group: list[tuple[int, int]],
    count_bytes: ByteCounter,
    ledger: Ledger,
    device: torch.device,
) -> None:
    """Scores the targets of some segments, each with up to eval_seq_len tokens of context, and enters them in the ledger."""
    seq = args.eval_seq_len
    ids = torch.zeros(args.eval_batch_segs, seq, dtype=torch.int64)
    begins = []
    for j, (s, e) in enumerate(group):
        b = max(0, e - seq)
        ids[j, : e - b] = val_tokens[b:e].to(torch.int64)
        begins.append(b)
    ids = ids.to(device)
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        h = hidden(ids, adapters)
        h = torch.cat([h[j, s - b : e - b] for j, ((s, e), b) in enumerate(zip(group, begins))])
        logits = model.head(h)
    prev = torch.cat([val_tokens[s:e] for s, e in group]).to(device, torch.int64)
    tgt = torch.cat([val_tokens[s + 1 : e + 1] for s, e in group]).to(device, torch.int64)
    if mixer is not None and stream is not None:
        positions = np.concatenate([np.arange(s + 1, e + 1, dtype=np.int64) for s, e in group])
        logp = mixer.mix(logits, stream, positions)
    else:
        logp = F.log_softmax(logits.float(), dim=-1)
    nll = -logp.gather(1, tgt[:, None]).squeeze(1)
    ledger.add(nll, count_bytes(prev, tgt))


def adapt_on_chunk(
    args: Hyperparameters,
    hidden,
    model: GPT,
    adapters: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    val_tokens: Tensor,
    lo: int,
    hi: int,
    ranks: Ranks,
) -> float:
    """LoRA steps on a chunk that has been scored; the ranks share out its sequences and average the gradients."""
    seq = args.eval_seq_len
    starts = list(range(lo, hi - seq + 1, seq))
    per_step = args.ttt_batch_seqs * ranks.world
    params = [p for p in adapters.parameters()]
    last = 0.0
    for epoch in range(args.ttt_epochs):
        for i in range(0, len(starts) - per_step + 1, per_step):
            mine = starts[i + ranks.rank : i + per_step : ranks.world]
            x = torch.stack([val_tokens[s : s + seq] for s in mine]).to(ranks.device, torch.int64)
            y = torch.stack([val_tokens[s + 1 : s + seq + 1] for s in mine]).to(ranks.device, torch.int64)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = model.head(hidden(x, adapters))
                loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1))
            loss.backward()
            for p in params:
                ranks.mean_(p.grad)
            torch.nn.utils.clip_grad_norm_(params, args.ttt_clip)
            optimizer.step()
            last = float(loss.detach())
    return last


def eval_ngram_ttt(
    args: Hyperparameters,
    model: GPT,
    val_tokens: Tensor,
    count_bytes: ByteCounter,
    ranks: Ranks,
    log: Log,
    started: float,
) -> tuple[float, float, int]:
    """One pass over the validation tokens. Chunk c is scored with what chunks < c have left in tables and adapters."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    hidden = torch.compile(model.hidden, dynamic=False)
    adapters = build_adapters(args, ranks.device)
    optimizer = torch.optim.AdamW(
        adapters.parameters(), lr=args.ttt_lr, betas=(args.ttt_beta1, args.ttt_beta2), weight_decay=0.0, fused=True
    )
    tables = NgramTables(args) if args.ngram_enabled else None
    mixer = NgramMixer(args, tables, ranks.device) if tables is not None else None
    stream = tables.padded(val_tokens) if tables is not None else None
    ledger = Ledger(ranks.device)
    total = val_tokens.numel() - 1
    chunks = chunk_bounds(total, args.chunk_tokens)
    adapting = args.ttt_enabled
    for c, (lo, hi) in enumerate(chunks):
        mine = segments_of(lo, hi, args.eval_stride)[ranks.rank :: ranks.world]
        for i in range(0, len(mine), args.eval_batch_segs):
            group = mine[i : i + args.eval_batch_segs]
            score_segments(
                args, hidden, model, adapters, mixer, val_tokens, stream, group, count_bytes, ledger, ranks.device
            )
        if c + 1 == len(chunks):
            break
        if tables is not None and mixer is not None:
            tables.absorb(stream, lo + 1, hi + 1)
            mixer.refresh()
        if adapting and ranks.any(time.perf_counter() - started > args.eval_budget_s):
            log(f"ttt: budget of {args.eval_budget_s:.0f}s used at chunk {c}, no more steps")
            adapting = False
        if adapting:
            for group in optimizer.param_groups:
                group["lr"] = args.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * c / len(chunks)))
            chunk_loss = adapt_on_chunk(args, hidden, model, adapters, optimizer, val_tokens, lo, hi, ranks)
            if c % 50 == 0:
                log(f"ttt: chunk {c}/{len(chunks)} adapt_loss:{chunk_loss:.4f} t:{time.perf_counter() - started:.1f}s")
    loss, bpb, tokens = ledger.result(ranks)
    if tokens != total:
        raise RuntimeError(f"scored {tokens} tokens of {total}")
    return loss, bpb, tokens


# -----------------------------
# TRAINING
# -----------------------------


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    block_params = list(model.blocks.named_parameters())
    matrices = [p for n, p in block_params if p.ndim == 2 and not any(c in n for c in CONTROL_PATTERNS)]
    matrices.append(model.bigram.up.weight)
    scalars = [p for n, p in block_params if p.ndim < 2 or any(c in n for c in CONTROL_PATTERNS)]
    scalars += [model.skip_weights, model.bigram.gain]
    betas = (args.beta1, args.beta2)
    tables = torch.optim.AdamW(
        [{"params": [model.tok_emb.weight, model.bigram.table.weight], "lr": args.embed_lr, "base_lr": args.embed_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    muon = Muon(
        matrices,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_wd,
    )
    for group in muon.param_groups:
        group["base_lr"] = args.matrix_lr
    small = torch.optim.AdamW(
        [{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=betas,
        eps=args.adam_eps,
        weight_decay=args.adam_wd,
        fused=True,
    )
    return [tables, muon, small], muon


def lr_mul(args: Hyperparameters, step: int, elapsed_ms: float, cap_ms: float) -> float:
    """Constant, then linear to zero; the end is where the wall clock will stop us."""
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


class Trainer:
    def __init__(self, args: Hyperparameters, model: GPT, ranks: Ranks, log: Log) -> None:
        self.args, self.model, self.ranks, self.log = args, model, ranks, log
        self.grad_accum_steps = max(1, 8 // ranks.world)
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
        self.net: nn.Module = (
            DDP(compiled, device_ids=[ranks.local], broadcast_buffers=False) if ranks.distributed else compiled
        )
        self.optimizers, self.muon = build_optimizers(args, model)
        self.loader = DistributedTokenLoader(args.train_files, ranks)
        self.ema: EMA | None = None

    def forward_backward(self) -> Tensor:
        args = self.args
        loss_sum = torch.zeros((), device=self.ranks.device)
        for micro in range(self.grad_accum_steps):
            if self.ranks.distributed:
                self.net.require_backward_grad_sync = micro == self.grad_accum_steps - 1
            x, y = self.loader.next_batch(args.train_batch_tokens, args.train_seq_len, self.grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.net(x, y)
            loss_sum += loss.detach()
            (loss / self.grad_accum_steps).backward()
        return loss_sum / self.grad_accum_steps

    def optimizer_step(self, step: int, scale: float) -> None:
        args = self.args
        frac = min(step / args.muon_momentum_steps, 1.0) if args.muon_momentum_steps > 0 else 1.0
        momentum = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip_norm)
        for opt in self.optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Compiles everything, then puts weights, optimizers and the data stream back to where they were."""
        if self.args.warmup_steps <= 0:
            return
        weights = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.optimizers]
        self.net.train()
        for i in range(self.args.warmup_steps):
            self.forward_backward()
            self.optimizer_step(0, 1.0)
        self.log(f"warmup: {self.args.warmup_steps} steps")
        self.model.load_state_dict(weights, strict=True)
        for opt, state in zip(self.optimizers, states, strict=True):
            opt.load_state_dict(state)
            opt.zero_grad(set_to_none=True)
        self.loader = DistributedTokenLoader(self.args.train_files, self.ranks)

    def train(self, val_tokens: Tensor, count_bytes: ByteCounter) -> float:
        """Trains until the clock stops it; returns the milliseconds used. Validation in between is only logged."""
        args, ranks, log = self.args, self.ranks, self.log
        cap_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)
        train_ms = 0.0
        step, stop_at = 0, None
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        while True:
            last = step == args.iterations or (stop_at is not None and step >= stop_at)
            if last or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
                torch.cuda.synchronize()
                train_ms += 1000.0 * (time.perf_counter() - t0)
                val_loss, val_bpb, _ = eval_plain(args, self.model, val_tokens, count_bytes, ranks)
                log(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} train_time:{train_ms:.0f}ms")
                torch.cuda.synchronize()
                t0 = time.perf_counter()
            if last:
                break
            elapsed_ms = train_ms + 1000.0 * (time.perf_counter() - t0)
            scale = lr_mul(args, step, elapsed_ms, cap_ms)
            loss = self.forward_backward()
            self.optimizer_step(step, scale)
            step += 1
            if scale < 1.0:
                if self.ema is None:
                    self.ema = EMA(self.model, args.ema_decay)
                else:
                    self.ema.update(self.model)
            approx_ms = train_ms + 1000.0 * (time.perf_counter() - t0)
            if step <= 5 or step % args.train_log_every == 0:
                log(f"step:{step}/{args.iterations} train_loss:{loss.item():.4f} train_time:{approx_ms:.0f}ms avg:{approx_ms / step:.2f}ms")
            if stop_at is None and step % 4 == 0 and ranks.any(approx_ms >= cap_ms):
                stop_at = step
        return train_ms


# -----------------------------
# MAIN
# -----------------------------


def set_up(args: Hyperparameters, ranks: Ranks) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(2)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)


def write_artifact(args: Hyperparameters, packed: dict[str, dict], code: str, ranks: Ranks, log: Log) -> None:
    if ranks.master:
        blob = pack_model(packed)
        Path(args.artifact_path).write_bytes(blob)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = len(blob) + code_bytes
        log(f"Serialized model int5/int6+brotli: {len(blob)} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size: {total_bytes} bytes")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"{total_bytes} bytes are more than {args.size_limit}")
    ranks.barrier()


def read_artifact(args: Hyperparameters, device: torch.device) -> GPT:
    state = unpack_model(Path(args.artifact_path).read_bytes())
    model = new_model(args, device)
    model.load_state_dict(state, strict=True)
    return model


def main() -> None:
    global zeropower_via_newtonschulz5
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)
    ranks = Ranks()
    log = Log(ranks, args.run_id)
    log(code, console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}", console=False)
    log(subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, text=True, check=False).stdout, console=False)
    set_up(args, ranks)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size}, but the tokenizer has {int(sp.vocab_size())}")
    count_bytes = ByteCounter(sp, args.vocab_size, ranks.device)
    val_tokens = load_validation_tokens(args.val_files)
    log(f"val tokens: {val_tokens.numel() - 1}")

    # ---- training
    model = new_model(args, ranks.device)
    log(f"model_params:{sum(p.numel() for p in model.parameters())} world:{ranks.world} seed:{args.seed}")
    trainer = Trainer(args, model, ranks, log)
    trainer.warm_up()
    train_ms = trainer.train(val_tokens, count_bytes)
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- quantisation, inside the training time
    torch.cuda.synchronize()
    q0 = time.perf_counter()
    if trainer.ema is not None:
        trainer.ema.copy_to(model)
    hessians = collect_hessians(args, model, trainer.loader, ranks)
    packed = quantize_model(args, model, hessians, ranks)
    torch.cuda.synchronize()
    quant_ms = 1000.0 * (time.perf_counter() - q0)
    log(f"gptq: {quant_ms:.0f}ms, training and gptq: {train_ms + quant_ms:.0f}ms of {1000 * args.max_wallclock_seconds:.0f}ms")
    write_artifact(args, packed, code, ranks, log)
    del trainer, model, hessians, packed
    torch.cuda.empty_cache()

    # ---- evaluation: nothing but the artifact and the validation tokens from here on
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = read_artifact(args, ranks.device)
    rt_loss, rt_bpb, _ = eval_plain(args, model, val_tokens, count_bytes, ranks)
    log(f"final_roundtrip val_loss:{rt_loss:.4f} val_bpb:{rt_bpb:.4f} eval_time:{1000 * (time.perf_counter() - started):.0f}ms")
    val_loss, val_bpb, scored = eval_ngram_ttt(args, model, val_tokens, count_bytes, ranks, log, started)
    torch.cuda.synchronize()
    eval_s = time.perf_counter() - started
    log(f"final_ngram_ttt val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} tokens:{scored} eval_time:{1000 * eval_s:.0f}ms")
    log(f"final_ngram_ttt_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if ranks.distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
