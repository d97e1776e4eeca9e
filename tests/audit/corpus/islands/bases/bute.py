"""
train_gpt.py, grown out of the challenge baseline.

What is different from the baseline: 11 layers, 3x relu^2 MLP, hashed bigram embedding, EMA, int6 GPTQ + lzma, and at
evaluation a backoff n-gram cache of the tokens that were scored already, mixed into the transformer's distribution.
Rules of the house: one script, numpy for the tables, torch for the rest, the clock is always visible in the log.
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
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
from torch.nn.parallel import DistributedDataParallel as DDP

# -----------------------------
# SETTINGS
# -----------------------------
# Everything can be overridden from the environment; the defaults are the submitted run.


class Hyperparameters:
    # Data.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Logging / validation while training (only looked at, never acted upon).
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 250))

    # Length of the run.
    iterations = int(os.environ.get("ITERATIONS", 20_000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 16.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 32))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    bigram_buckets = int(os.environ.get("BIGRAM_BUCKETS", 3072))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 96))

    # Optimizers.
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.01))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))

    # Quantisation.
    quant_clip = int(os.environ.get("QUANT_CLIP", 31))
    gptq_batches = int(os.environ.get("GPTQ_BATCHES", 48))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    size_limit = int(os.environ.get("SIZE_LIMIT", 16_000_000))

    # Evaluation: sliding window, chunk by chunk.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch = int(os.environ.get("EVAL_BATCH", 64))
    chunk_tokens = int(os.environ.get("CHUNK_TOKENS", 131_072))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 540.0))

    # The n-gram cache.
    ngram_min = int(os.environ.get("NGRAM_MIN", 2))
    ngram_max = int(os.environ.get("NGRAM_MAX", 9))
    ngram_bits = int(os.environ.get("NGRAM_BITS", 26))
    ngram_ctx_bits = int(os.environ.get("NGRAM_CTX_BITS", 24))
    ngram_min_seen = int(os.environ.get("NGRAM_MIN_SEEN", 2))
    mix_min = float(os.environ.get("MIX_MIN", 0.02))
    mix_max = float(os.environ.get("MIX_MAX", 0.55))
    mix_center = float(os.environ.get("MIX_CENTER", 3.6))
    mix_order_shift = float(os.environ.get("MIX_ORDER_SHIFT", 0.25))
    mix_scale = float(os.environ.get("MIX_SCALE", 1.6))
    mix_conf = float(os.environ.get("MIX_CONF", 3.0))

    # Score-first adaptation of the transformer on the chunks already scored.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lr = float(os.environ.get("TTT_LR", 0.002))
    ttt_momentum = float(os.environ.get("TTT_MOMENTUM", 0.9))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 1))
    ttt_batch_seqs = int(os.environ.get("TTT_BATCH_SEQS", 8))
    ttt_clip = float(os.environ.get("TTT_CLIP", 1.0))


CONTROL_PATTERNS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "bigram_scale")

# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    # Orthogonalise a 2D update with a quintic Newton-Schulz iteration.
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
    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = group["params"]
            if not params:
                continue
            lr, momentum = group["lr"], group["momentum"]
            # Every rank orthogonalises its share of the matrices; the updates travel in one flat buffer.
            flat = torch.zeros(sum(int(p.numel()) for p in params), device=params[0].device, dtype=torch.bfloat16)
            at = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[at : at + p.numel()] = g.reshape(-1)
                at += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            at = 0
            for p in params:
                if group["weight_decay"] > 0:
                    p.data.mul_(1.0 - lr * group["weight_decay"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(dtype=p.dtype), alpha=-lr)
                at += p.numel()
        return loss


# -----------------------------
# BYTES PER TOKEN
# -----------------------------
# val_bpb is compression per byte of text, so every scored token has to be worth the bytes it stands for: the UTF-8
# length of its piece, one byte for its leading space unless the token before it is a control token (sentencepiece
# swallows the space there), one byte for a byte-fallback piece, nothing for control tokens.


def build_sentencepiece_luts(sp, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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
        if piece.startswith("\u2581"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )


def count_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    base_bytes, has_space, is_boundary = luts
    n = base_bytes[tgt_ids].to(dtype=torch.int16)
    n += (has_space[tgt_ids] & ~is_boundary[prev_ids]).to(dtype=torch.int16)
    return n.to(torch.float64).sum()


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    if file.stat().st_size != header_bytes + num_tokens * token_bytes:
        raise ValueError(f"Shard size mismatch for {file}")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The export pipeline writes the fixed first-50k-document split; all of it is kept, down to the last token.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class TokenStream:
    # Reads shards in order, wraps around forever, knows nothing about batches.
    def __init__(self, pattern: str):
        self.files = [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.files:
            raise FileNotFoundError(f"No files found for pattern: {pattern}")
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
    # Each call takes one contiguous piece of the stream and hands every rank its own disjoint span of it.
    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self.world_size = world_size
        self.device = device
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
# TRANSFORMER
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # Weights stay fp32 for the optimizer, cast at matmul time.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            if (param.ndim < 2 or any(p in name for p in CONTROL_PATTERNS)) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._seq_len_cached != seq_len or self._cos.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos = freqs.cos()[None, None, :, :]
            self._sin = freqs.sin()[None, None, :, :]
            self._seq_len_cached = seq_len
        return self._cos.to(dtype=dtype), self._sin.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    # Only the first `dims` of each head turn, the rest stay position-free.
    rot, rest = x[..., :dims], x[..., dims:]
    half = dims // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim, self.num_heads, self.num_kv_heads = args.model_dim, args.num_heads, args.num_kv_heads
        if dim % self.num_heads != 0 or self.num_heads % self.num_kv_heads != 0:
            raise ValueError("heads must divide model_dim, kv heads must divide heads")
        self.head_dim = dim // self.num_heads
        self.rope_dims = min(args.rope_dims, self.head_dim)
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), args.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, base=args.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x).reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin, self.rope_dims)
        k = apply_rotary_emb(k, cos, sin, self.rope_dims)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, is_causal=True, enable_gqa=(self.num_kv_heads != self.num_heads)
        )
        return self.proj(y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mult * dim, bias=False)
        self.proj = CastedLinear(mult * dim, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.fc(x), negative_slope=0.5)
        return self.proj(x.square())


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attn = CausalSelfAttention(args)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        attn_out = self.attn(self.attn_norm(x) * self.depth_scale)
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * attn_out
        mlp_out = self.mlp(self.mlp_norm(x) * self.depth_scale)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * mlp_out


class BigramEmbedding(nn.Module):
    # A learned vector for the pair (token before, token), hashed; it reads inputs only.
    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed = nn.Embedding(buckets, dim)
        nn.init.zeros_(self.embed.weight)
        self.up = CastedLinear(dim, model_dim, bias=False)
        self.bigram_scale = nn.Parameter(torch.tensor(0.05, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        prev = F.pad(ids[:, :-1], (1, 0), value=0)
        slot = (prev * 36313 + ids * 27191) % self.buckets
        return self.up(self.embed(slot)) * self.bigram_scale


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.logit_softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.bigram = BigramEmbedding(args.bigram_buckets, args.bigram_dim, args.model_dim)
        self.num_encoder_layers = args.num_layers // 2
        self.num_decoder_layers = args.num_layers - self.num_encoder_layers
        n_skip = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(n_skip, args.model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList([Block(args, i) for i in range(args.num_layers)])
        self.final_norm = RMSNorm()
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=args.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def forward_logits(self, input_ids: Tensor) -> Tensor:
        x = self.tok_emb(input_ids) + self.bigram(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            x = self.blocks[self.num_encoder_layers + i](x, x0)
        x = self.final_norm(x)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.forward_logits(input_ids)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)).float(), target_ids.reshape(-1), reduction="mean")


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    model = GPT(args).to(device).bfloat16()
    for module in model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(model)
    return model


def build_optimizers(args: Hyperparameters, model: GPT) -> tuple[list[torch.optim.Optimizer], Muon]:
    named = list(model.blocks.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_PATTERNS)]
    scalars = [p for n, p in named if p.ndim < 2 or any(c in n for c in CONTROL_PATTERNS)]
    scalars += [model.skip_weights, model.bigram.bigram_scale]
    matrices.append(model.bigram.up.weight)
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, weight_decay=args.adam_wd, fused=True)
    embeds = [model.tok_emb.weight, model.bigram.embed.weight]
    opt_tok = torch.optim.AdamW([{"params": embeds, "lr": args.tied_embed_lr, "base_lr": args.tied_embed_lr}], **adam)
    opt_scalar = torch.optim.AdamW([{"params": scalars, "lr": args.scalar_lr, "base_lr": args.scalar_lr}], **adam)
    opt_muon = Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_wd)
    for group in opt_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    return [opt_tok, opt_muon, opt_scalar], opt_muon


def lr_scale(args: Hyperparameters, step: int, elapsed_ms: float, cap_ms: float) -> float:
    # Warmdown measured in wall clock: the last warmdown_iters steps' worth of time that is left under the cap.
    if args.warmdown_iters <= 0:
        return 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms = args.warmdown_iters * step_ms
    remaining_ms = max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


# -----------------------------
# EMA
# -----------------------------


def ema_start(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().float().clone() for name, t in model.state_dict().items()}


@torch.no_grad()
def ema_update(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, t in model.state_dict().items():
        ema[name].mul_(decay).add_(t.detach().float(), alpha=1.0 - decay)


@torch.no_grad()
def ema_apply(ema: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    model.load_state_dict({name: t.to(dtype=own[name].dtype) for name, t in ema.items()}, strict=True)


# -----------------------------
# INT6 GPTQ
# -----------------------------
# Every CastedLinear matrix goes to [-clip, clip] integers with one scale per row, rounding columns one after another and
# pushing each column's error into the columns still to come (GPTQ). Embeddings: plain int8 rows. The rest: fp16.


def collect_hessians(args: Hyperparameters, model: GPT, loader: DistributedTokenLoader) -> dict[str, Tensor]:
    hessians: dict[str, Tensor] = {}
    handles = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            if name not in hessians:
                hessians[name] = torch.zeros(flat.size(1), flat.size(1), device=flat.device, dtype=torch.float32)
            hessians[name].addmm_(flat.T, flat)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, CastedLinear):
            handles.append(module.register_forward_pre_hook(watch(name + ".weight")))
    model.eval()
    with torch.no_grad():
        for _ in range(args.gptq_batches):
            x, _ = loader.next_batch(32_768 * loader.world_size, args.train_seq_len, 1)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                model.forward_logits(x)
    for handle in handles:
        handle.remove()
    if dist.is_available() and dist.is_initialized():
        for name in sorted(hessians):
            dist.all_reduce(hessians[name], op=dist.ReduceOp.SUM)
    return hessians


def row_scales(W: Tensor, clip: int) -> Tensor:
    # A small search: the clipping ratio with the least squared error, row by row.
    best_err = torch.full((W.size(0),), float("inf"), device=W.device)
    top = W.abs().amax(dim=1).clamp_min(1e-8)
    best = top / clip
    for ratio in (1.0, 0.97, 0.94, 0.9, 0.86, 0.82):
        s = top * ratio / clip
        q = torch.clamp(torch.round(W / s[:, None]), -clip, clip)
        err = (q * s[:, None] - W).square().sum(dim=1)
        better = err < best_err
        best = torch.where(better, s, best)
        best_err = torch.where(better, err, best_err)
    return best.half().float().clamp_min(1e-7)


def gptq_matrix(W: Tensor, H: Tensor, clip: int, block: int, damp: float) -> tuple[Tensor, Tensor]:
    W = W.float().clone()
    cols = W.size(1)
    dead = torch.diag(H) == 0
    H = H.clone()
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    order = torch.argsort(torch.diag(H), descending=True)
    W, H = W[:, order], H[order][:, order]
    H.diagonal().add_(damp * torch.diag(H).mean())
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(Hinv, upper=True)
    scale = row_scales(W, clip)
    Q = torch.zeros_like(W)
    for a in range(0, cols, block):
        b = min(a + block, cols)
        part = W[:, a:b].clone()
        errs = torch.zeros_like(part)
        for i in range(b - a):
            w = part[:, i]
            q = torch.clamp(torch.round(w / scale), -clip, clip)
            Q[:, a + i] = q
            err = (w - q * scale) / Hinv[a + i, a + i]
            part[:, i:] -= err[:, None] * Hinv[a + i, a + i : b][None, :]
            errs[:, i] = err
        W[:, b:] -= errs @ Hinv[a:b, b:]
    return Q[:, torch.argsort(order)].to(torch.int8), scale.half()


def quantize_model(args: Hyperparameters, model: GPT, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        t = t.detach()
        if name in hessians:
            q, s = gptq_matrix(t, hessians[name], args.quant_clip, args.gptq_block, args.gptq_damp)
            packed[name + "|q"], packed[name + "|s"] = q.cpu(), s.cpu()
        elif t.ndim == 2 and t.numel() > 65_536:
            s = row_scales(t.float(), 127)
            q = torch.clamp(torch.round(t.float() / s[:, None]), -127, 127)
            packed[name + "|q"], packed[name + "|s"] = q.to(torch.int8).cpu(), s.half().cpu()
        else:
            packed[name] = t.half().cpu()
    return packed


def dequantize_into(model: GPT, packed: dict[str, Tensor]) -> None:
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, t in own.items():
        if name + "|q" in packed:
            value = packed[name + "|q"].float() * packed[name + "|s"].float()[:, None]
        else:
            value = packed[name].float()
        state[name] = value.to(device=t.device, dtype=t.dtype)
    model.load_state_dict(state, strict=True)


def pack_to_file(packed: dict[str, Tensor], path: str) -> int:
    buf = io.BytesIO()
    torch.save(packed, buf)
    blob = lzma.compress(buf.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    Path(path).write_bytes(blob)
    return len(blob)


def unpack_from_file(path: str) -> dict[str, Tensor]:
    raw = lzma.decompress(Path(path).read_bytes())
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


# -----------------------------
# PLAIN VALIDATION (progress log)
# -----------------------------


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    seq = args.train_seq_len
    batch_seqs = max(args.val_batch_size // (world_size * seq), 1)
    total_seqs = (val_tokens.numel() - 1) // seq
    lo, hi = total_seqs * rank // world_size, total_seqs * (rank + 1) // world_size
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for a in range(lo, hi, batch_seqs):
            b = min(a + batch_seqs, hi)
            local = val_tokens[a * seq : b * seq + 1].to(device=device, dtype=torch.int64)
            x, y = local[:-1].reshape(-1, seq), local[1:].reshape(-1, seq)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = model(x, y).detach()
            sums[0] += loss.to(torch.float64) * y.numel()
            sums[1] += y.numel()
            sums[2] += count_bytes(x.reshape(-1), y.reshape(-1), luts)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    model.train()
    val_loss = float(sums[0] / sums[1])
    return val_loss, val_loss / math.log(2.0) * float(sums[1] / sums[2])


# -----------------------------
# N-GRAM CACHE
# -----------------------------
# Two flat count tables per order n: ctx[h(context)] says how often a context was met, full[h(context) ^ h(token)] how
# often a token followed it. A prediction looks up ALL tokens of the vocabulary behind the context and divides by the
# sum of what it found, so collisions cost sharpness, never mass. `purity` = ctx count / that sum tells how much of the
# row is the context's own; it scales the mixing weight down where the table is crowded.

HASH_MUL = np.uint64(0x9E3779B97F4A7C15)
HASH_MIX = np.uint64(0xBF58476D1CE4E5B9)


def new_cache(args: Hyperparameters) -> dict:
    orders = list(range(args.ngram_min, args.ngram_max + 1))
    salt = np.arange(1, args.vocab_size + 1, dtype=np.uint64) * HASH_MUL
    return {
        "orders": orders,
        "ctx": {n: np.zeros(1 << args.ngram_ctx_bits, dtype=np.uint32) for n in orders},
        "full": {n: np.zeros(1 << args.ngram_bits, dtype=np.uint32) for n in orders},
        "ctx_mask": np.uint64((1 << args.ngram_ctx_bits) - 1),
        "full_mask": np.uint64((1 << args.ngram_bits) - 1),
        "salt": salt ^ (salt >> np.uint64(31)),
        "fed": 0,
    }


def context_keys(cache: dict, toks: np.ndarray, pos: np.ndarray):
    # For each order n: the hash of toks[pos-n+1 .. pos-1], and whether so many tokens stand before pos at all.
    h = np.zeros(pos.shape, dtype=np.uint64)
    for n in range(2, cache["orders"][-1] + 1):
        back = pos - (n - 1)
        h = (h + toks[np.maximum(back, 0)].astype(np.uint64) + np.uint64(1)) * HASH_MUL
        h ^= h >> np.uint64(29)
        if n in cache["ctx"]:
            key = h * HASH_MIX
            yield n, key ^ (key >> np.uint64(32)), back >= 0


def cache_feed(cache: dict, toks: np.ndarray, lo: int, hi: int) -> None:
    # Counts the targets lo .. hi-1, which must have been scored.
    for a in range(lo, hi, 1 << 20):
        pos = np.arange(a, min(a + (1 << 20), hi), dtype=np.int64)
        salt = cache["salt"][toks[pos]]
        for n, key, ok in context_keys(cache, toks, pos):
            np.add.at(cache["ctx"][n], (key[ok] & cache["ctx_mask"]).astype(np.int64), 1)
            np.add.at(cache["full"][n], ((key[ok] ^ salt[ok]) & cache["full_mask"]).astype(np.int64), 1)
    cache["fed"] += hi - lo


def cache_lookup(args: Hyperparameters, cache: dict, toks: np.ndarray, pos: np.ndarray):
    # Backoff: the longest context met at least ngram_min_seen times wins. Returns, per position, the order (0: none),
    # the count of the context, and the counts of every token of the vocabulary behind it.
    best = np.zeros(pos.shape, dtype=np.int64)
    best_key = np.zeros(pos.shape, dtype=np.uint64)
    seen = np.zeros(pos.shape, dtype=np.float32)
    for n, key, ok in context_keys(cache, toks, pos):
        met = cache["ctx"][n][(key & cache["ctx_mask"]).astype(np.int64)]
        hit = ok & (met >= args.ngram_min_seen)
        best[hit] = n
        best_key[hit] = key[hit]
        seen[hit] = met[hit]
    counts = np.zeros((pos.size, args.vocab_size), dtype=np.float32)
    for n in cache["orders"]:
        rows = np.nonzero(best == n)[0]
        for a in range(0, rows.size, 1024):
            part = rows[a : a + 1024]
            slots = (best_key[part][:, None] ^ cache["salt"][None, :]) & cache["full_mask"]
            counts[part] = cache["full"][n][slots.astype(np.int64)]
    return best, seen, counts


def mixing_weight(args: Hyperparameters, entropy: Tensor, order: Tensor, seen: Tensor, mass: Tensor) -> Tensor:
    # More cache where the transformer is unsure, where the match is long, and where the row is clean.
    center = args.mix_center - args.mix_order_shift * (order - args.ngram_min)
    lam = args.mix_min + (args.mix_max - args.mix_min) * torch.sigmoid(args.mix_scale * (entropy - center))
    purity = (seen / mass.clamp_min(1.0)).clamp(max=1.0)
    lam = lam * purity * seen / (seen + args.mix_conf)
    return torch.where((order > 0) & (mass > 0), lam, torch.zeros_like(lam))


def mix_nll(
    args: Hyperparameters, cache: dict | None, toks: np.ndarray, pos: np.ndarray, logits: Tensor, targets: Tensor
) -> Tensor:
    # -ln of the mixture at the targets. logits: [N, V], of the positions that predict toks[pos].
    logp = F.log_softmax(logits.float(), dim=-1)
    if cache is None or cache["fed"] == 0:
        return -logp.gather(1, targets[:, None]).squeeze(1)
    probs = logp.exp()
    entropy = -(probs * logp).sum(dim=-1)
    best, seen_np, counts_np = cache_lookup(args, cache, toks, pos)
    order = torch.from_numpy(best).to(logits.device).float()
    seen = torch.from_numpy(seen_np).to(logits.device)
    counts = torch.from_numpy(counts_np).to(logits.device)
    mass = counts.sum(dim=-1)
    ngram = counts / mass.clamp_min(1.0)[:, None]
    lam = mixing_weight(args, entropy, order, seen, mass)
    mixed = (1.0 - lam)[:, None] * probs + lam[:, None] * ngram
    return -mixed.gather(1, targets[:, None]).squeeze(1).clamp_min(1e-30).log()


# -----------------------------
# THE SCORE
# -----------------------------
# The stream is cut into blocks of `stride` targets; block b is scored from the window that ends with it, so every
# target after the first token is scored once. Blocks are grouped into chunks. Per chunk: (1) all ranks score their
# blocks with the state left by the chunks before; (2) every rank feeds the same whole chunk to its own copy of the
# cache; (3) the ranks take SGD steps on it together. Nothing of a chunk is used before all of it has been scored.


def window_batch(toks: np.ndarray, blocks: list[int], seq: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Inputs [B, seq], and for each target scored here its index in the stream and its place in the flattened batch.
    total = toks.size - 1
    x = np.zeros((len(blocks), seq), dtype=np.int64)
    pos, place = [], []
    for row, b in enumerate(blocks):
        first, last = b * stride, min((b + 1) * stride, total)
        start = max(0, last - seq)
        x[row, : last - start] = toks[start:last]
        pos.append(np.arange(first, last, dtype=np.int64) + 1)
        place.append(row * seq + np.arange(first, last, dtype=np.int64) - start)
    return x, np.concatenate(pos), np.concatenate(place)


def adapt_on_chunk(
    args: Hyperparameters,
    model: GPT,
    opt: torch.optim.Optimizer,
    chunk: Tensor,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    seq = args.eval_seq_len
    n_seqs = (chunk.numel() - 1) // seq
    if n_seqs == 0:
        return
    x_all = chunk[: n_seqs * seq].reshape(n_seqs, seq)
    y_all = chunk[1 : n_seqs * seq + 1].reshape(n_seqs, seq)
    per_step = args.ttt_batch_seqs * world_size
    model.train()
    for _ in range(args.ttt_epochs):
        for a in range(0, n_seqs, per_step):
            mine = torch.arange(a + rank, min(a + per_step, n_seqs), world_size)
            opt.zero_grad(set_to_none=False)
            if mine.numel() > 0:
                x, y = x_all[mine].to(device), y_all[mine].to(device)
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    loss = model(x, y)
                (loss * mine.numel() / min(per_step, n_seqs - a)).backward()
            for p in model.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if world_size > 1:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.ttt_clip)
            opt.step()
    model.eval()


def over_budget(t0: float, budget: float, device: torch.device) -> bool:
    # Rank 0's clock decides for everybody, so that the ranks stay in step.
    flag = torch.tensor([time.perf_counter() - t0 > budget], device=device, dtype=torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(flag, src=0)
    return bool(flag.item())


def eval_mixture(
    args: Hyperparameters,
    model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
    log0,
) -> tuple[float, float]:
    t0 = time.perf_counter()
    toks = val_tokens.numpy().astype(np.int64)
    seq, stride = args.eval_seq_len, args.eval_stride
    total = toks.size - 1
    n_blocks = (total + stride - 1) // stride
    per_chunk = max(args.chunk_tokens // stride, 1)
    n_chunks = (n_blocks + per_chunk - 1) // per_chunk
    cache = new_cache(args)
    forward_logits = torch.compile(model.forward_logits, dynamic=False)
    opt = torch.optim.SGD(model.parameters(), lr=args.ttt_lr, momentum=args.ttt_momentum)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    frozen = False
    model.eval()
    for c in range(n_chunks):
        first_block, end_block = c * per_chunk, min((c + 1) * per_chunk, n_blocks)
        mine = list(range(first_block + rank, end_block, world_size))
        with torch.no_grad():
            for a in range(0, len(mine), args.eval_batch):
                blocks = mine[a : a + args.eval_batch]
                x_np, pos, place = window_batch(toks, blocks, seq, stride)
                x = torch.from_numpy(x_np).to(device)
                if x.size(0) < args.eval_batch:
                    x = F.pad(x, (0, 0, 0, args.eval_batch - x.size(0)))
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    logits = forward_logits(x)
                logits = logits.reshape(-1, logits.size(-1))[torch.from_numpy(place).to(device)]
                targets = torch.from_numpy(toks[pos]).to(device)
                prev = torch.from_numpy(toks[pos - 1]).to(device)
                nll = mix_nll(args, cache, toks, pos, logits, targets)
                sums[0] += nll.to(torch.float64).sum()
                sums[1] += targets.numel()
                sums[2] += count_bytes(prev, targets, luts)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        # The chunk is scored on every rank; now it may be learnt from, as long as there is time.
        if not frozen and over_budget(t0, args.eval_budget_seconds, device):
            frozen = True
            log0(f"mixture: chunk {c + 1}/{n_chunks}: budget reached, the rest is scored with the state as it is")
        if not frozen:
            lo, hi = first_block * stride, min(end_block * stride, total)
            cache_feed(cache, toks, lo + 1, hi + 1)
            if args.ttt_enabled and c + 1 < n_chunks:
                adapt_on_chunk(args, model, opt, torch.from_numpy(toks[lo : hi + 1]), rank, world_size, device)
        if (c + 1) % 50 == 0 or c + 1 == n_chunks:
            log0(
                f"mixture: chunk {c + 1}/{n_chunks} rank0_nll:{float(sums[0] / sums[1]):.4f} "
                f"fed:{cache['fed']} time:{time.perf_counter() - t0:.1f}s"
            )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    log0(f"mixture: scored_tokens:{int(sums[1])} of {total} bytes:{int(sums[2])}")
    val_loss = float(sums[0] / sums[1])
    return val_loss, val_loss / math.log(2.0) * float(sums[1] / sums[2])


# -----------------------------
# MAIN
# -----------------------------


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def main() -> None:
    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()

    # ---- distributed + cuda
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8 so grad_accum_steps stays integral")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master = rank == 0
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(False)

    logfile = None
    if master:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"

    def log0(msg: str, console: bool = True) -> None:
        if not master:
            return
        if console:
            print(msg, flush=True)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Python {sys.version.split()[0]} PyTorch {torch.__version__} numpy {np.__version__}")

    # ---- tokenizer, validation tokens, byte tables
    set_seeds(args.seed)
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    log0(f"val_loader:shards pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # ---- model, optimizers
    base_model = build_model(args, device)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )
    optimizers, opt_muon = build_optimizers(args, base_model)
    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params} world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")

    # ---- training data
    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    def forward_backward() -> Tensor:
        train_loss = torch.zeros((), device=device)
        for micro in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        return train_loss / grad_accum_steps

    # ---- warm-up: primes the kernels on training batches, then everything is put back
    if args.warmup_steps > 0:
        initial_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_opts = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for step in range(args.warmup_steps):
            zero_grad_all()
            forward_backward()
            for opt in optimizers:
                opt.step()
        base_model.load_state_dict(initial_state, strict=True)
        for opt, state in zip(optimizers, initial_opts, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        if distributed:
            model.require_backward_grad_sync = True
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)
        log0(f"warmup_steps:{args.warmup_steps} done, state restored")

    # ---- training loop. The loop stops gptq_reserve_seconds before the cap: calibration reads training data as well,
    # so it has to be over when the 600 seconds are.
    cap_ms = 1000.0 * (args.max_wallclock_seconds - args.gptq_reserve_seconds)
    training_time_ms = 0.0
    stop_after_step: int | None = None
    ema = ema_start(base_model)
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        if last_step or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time_ms += 1000.0 * (time.perf_counter() - t0)
            val_loss, val_bpb = eval_val(args, compiled_model, rank, world_size, device, val_tokens, luts)
            log0(
                f"step:{step}/{args.iterations} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
                f"train_time:{training_time_ms:.0f}ms step_avg:{training_time_ms / max(step, 1):.2f}ms"
            )
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last_step:
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_scale(args, step, elapsed_ms, cap_ms)
        zero_grad_all()
        train_loss = forward_backward()
        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in opt_muon.param_groups:
            group["momentum"] = momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        ema_update(ema, base_model, args.ema_decay)
        step += 1

        approx_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} train_time:{approx_ms:.0f}ms")
        reached_cap = approx_ms >= cap_ms
        if distributed:
            flag = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            reached_cap = bool(flag.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    # ---- EMA, Hessians from further training batches, int6. Still on the training clock.
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    ema_apply(ema, base_model)
    hessians = collect_hessians(args, base_model, train_loader)
    torch.cuda.synchronize()
    calib_ms = 1000.0 * (time.perf_counter() - t0)
    log0(f"gptq: hessians from {args.gptq_batches} train batches in {calib_ms:.0f}ms")
    log0(f"training data released after {training_time_ms + calib_ms:.0f}ms of {1000 * args.max_wallclock_seconds:.0f}ms")
    del train_loader
    if master:
        packed = quantize_model(args, base_model, hessians)
        model_bytes = pack_to_file(packed, args.artifact_path)
        code_bytes = len(code.encode("utf-8"))
        total_bytes = model_bytes + code_bytes
        log0(f"Serialized model int6+lzma: {model_bytes} bytes")
        log0(f"Code size: {code_bytes} bytes")
        log0(f"Total submission size: {total_bytes} bytes (limit {args.size_limit})")
        if total_bytes > args.size_limit:
            raise RuntimeError(f"submission too large: {total_bytes} > {args.size_limit}")
    if distributed:
        dist.barrier()

    # ---- evaluation starts from the file alone
    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    eval_model = build_model(args, device)
    dequantize_into(eval_model, unpack_from_file(args.artifact_path))
    q_loss, q_bpb = eval_val(args, eval_model, rank, world_size, device, val_tokens, luts)
    log0(f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} eval_time:{time.perf_counter() - t_eval:.1f}s")

    val_loss, val_bpb = eval_mixture(args, eval_model, rank, world_size, device, val_tokens, luts, log0)
    torch.cuda.synchronize()
    log0(f"eval_time_total:{time.perf_counter() - t_eval:.1f}s")
    log0(f"final_ngram_mix val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
    log0(f"final_ngram_mix_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
