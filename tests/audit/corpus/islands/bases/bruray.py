"""
train_gpt.py - fork of the parameter-golf baseline (SP8192, SmearGate, 11L U-net, MuonEq, EMA, int6 GPTQ, per-document LoRA TTT)

Course project notes:
  * everything that is counted lives in this file
  * training clock = 600 s, of which GPTQ_RESERVE_SECONDS are held back so the Hessians are collected before the clock runs out
  * evaluation goes document by document. Phase 1: short documents, frozen model, sliding windows.
    Phase 2: long documents, a fresh LoRA for each document, score a chunk -> then learn from it -> next chunk.
  * every document predicts its own tokens plus the <s> that opens the next one, so all N-1 targets are scored once
"""

from __future__ import annotations

import copy
import glob
import io
import math
import os
import random
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

# ------------------------------------------------------------------------------------------------
# settings
# ------------------------------------------------------------------------------------------------


class Hyperparameters:
    # data
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp8192")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_8192_bpe.model")
    # per-token byte counts of the original text, for data sets whose text was transformed before tokenising
    val_bytes_files = os.environ.get("VAL_BYTES_FILES", "")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    out_dir = os.environ.get("OUT_DIR", ".")

    # clock and batch
    iterations = int(os.environ.get("ITERATIONS", 20000))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    gptq_reserve_seconds = float(os.environ.get("GPTQ_RESERVE_SECONDS", 13.0))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    warmdown_frac = float(os.environ.get("WARMDOWN_FRAC", 0.68))
    min_lr = float(os.environ.get("MIN_LR", 0.02))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 250))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 0))

    # model
    vocab_size = int(os.environ.get("VOCAB_SIZE", 8192))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    mlp_mult = float(os.environ.get("MLP_MULT", 4.0))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 5.0))
    smear_init = float(os.environ.get("SMEAR_INIT", -2.0))

    # optimizer
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.022))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.02))
    embed_lr = float(os.environ.get("EMBED_LR", 0.03))
    embed_init_std = float(os.environ.get("EMBED_INIT_STD", 0.005))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.97))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_warmup = int(os.environ.get("MUON_MOMENTUM_WARMUP", 1500))
    muon_steps = int(os.environ.get("MUON_STEPS", 5))
    muon_wd = float(os.environ.get("MUON_WD", 0.09))
    adam_wd = float(os.environ.get("ADAM_WD", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    grad_clip = float(os.environ.get("GRAD_CLIP", 0.3))

    # averaging
    ema_decay = float(os.environ.get("EMA_DECAY", 0.9965))
    ema_start_step = int(os.environ.get("EMA_START_STEP", 200))

    # quantisation
    calib_batches = int(os.environ.get("CALIB_BATCHES", 32))
    calib_seqs = int(os.environ.get("CALIB_SEQS", 8))
    gptq_damp = float(os.environ.get("GPTQ_DAMP", 0.01))
    gptq_block = int(os.environ.get("GPTQ_BLOCK", 128))
    matrix_bits = int(os.environ.get("MATRIX_BITS", 6))
    embed_bits = int(os.environ.get("EMBED_BITS", 8))
    matrix_clip_sigmas = float(os.environ.get("MATRIX_CLIP_SIGMAS", 12.85))
    embed_clip_sigmas = float(os.environ.get("EMBED_CLIP_SIGMAS", 20.0))
    size_limit = 16_000_000

    # evaluation
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_windows = int(os.environ.get("EVAL_BATCH_WINDOWS", 64))
    eval_budget_seconds = float(os.environ.get("EVAL_BUDGET_SECONDS", 540.0))
    logit_scale = float(os.environ.get("LOGIT_SCALE", 1.0))
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_min_doc_len = int(os.environ.get("TTT_MIN_DOC_LEN", 2560))
    ttt_chunk = int(os.environ.get("TTT_CHUNK", 64))
    ttt_batch_docs = int(os.environ.get("TTT_BATCH_DOCS", 32))
    ttt_epochs = int(os.environ.get("TTT_EPOCHS", 1))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 96))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 1e-4))
    ttt_lora_alpha = float(os.environ.get("TTT_LORA_ALPHA", 144.0))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.0))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.999))
    ttt_wd = float(os.environ.get("TTT_WD", 0.5))


BOS_ID = 1
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "smear")


class Logger:
    """print() on the first rank plus a copy in logs/<run_id>.txt"""

    def __init__(self, path: str | None):
        self.path = path
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, message: str, console: bool = True) -> None:
        if self.path is None:
            return
        if console:
            print(message, flush=True)
        with open(self.path, "a", encoding="utf-8") as f:
            print(message, file=f)


class Ranks:
    """who we are among the processes torchrun has started"""

    def __init__(self):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        if 8 % self.world_size != 0:
            raise ValueError("WORLD_SIZE must divide 8 so that gradient accumulation stays integral")
        self.grad_accum_steps = 8 // self.world_size
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()

    @property
    def master(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def any(self, flag: bool) -> bool:
        if not self.distributed:
            return flag
        t = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return bool(t.item())

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# MuonEq: Muon whose momentum is row-normalised before the Newton-Schulz iteration
# ------------------------------------------------------------------------------------------------


@torch.compile
def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    a, b, c = (3.4445, -4.7750, 2.0315)
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


class MuonEq(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float, steps: int, weight_decay: float, ranks: Ranks):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            total = sum(p.numel() for p in params)
            updates = torch.zeros(total, device=params[0].device, dtype=torch.bfloat16)
            curr = 0
            for i, p in enumerate(params):
                if i % self.ranks.world_size == self.ranks.rank and p.grad is not None:
                    updates[curr : curr + p.numel()] = self._direction(p, group).reshape(-1)
                curr += p.numel()
            self.ranks.sum(updates)
            curr = 0
            for p in params:
                g = updates[curr : curr + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                curr += p.numel()

    def _direction(self, p: Tensor, group: dict) -> Tensor:
        g = p.grad.float()
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(g)
        buf = state["momentum_buffer"]
        buf.mul_(group["momentum"]).add_(g)
        g = g.add(buf, alpha=group["momentum"])
        g = g / (g.norm(dim=-1, keepdim=True) + 1e-7)
        g = zeropower_via_newtonschulz5(g, steps=group["steps"])
        return g * max(1, g.size(0) / g.size(1)) ** 0.5


# ------------------------------------------------------------------------------------------------
# bytes per token
# ------------------------------------------------------------------------------------------------


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """base_bytes (without the leading space), has_leading_space, is_boundary (control/unknown/unused pieces)"""
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
    return base_bytes, has_leading_space, is_boundary


def bytes_of_stream(tokens: np.ndarray, luts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """bytes each token of a stream stands for; a leading space counts unless a boundary token comes before"""
    base_bytes, has_leading_space, is_boundary = luts
    out = base_bytes[tokens].astype(np.int64)
    out[1:] += has_leading_space[tokens[1:]] & ~is_boundary[tokens[:-1]]
    return out


# ------------------------------------------------------------------------------------------------
# shards
# ------------------------------------------------------------------------------------------------

HEADER_INTS = 256
SHARD_MAGIC = 20240520


def load_shard(path: Path) -> Tensor:
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {path}")
    num_tokens = int(header[2])
    tokens = np.fromfile(path, dtype="<u2", count=num_tokens, offset=HEADER_INTS * 4)
    if tokens.size != num_tokens:
        raise ValueError(f"Short read for {path}")
    return torch.from_numpy(tokens.astype(np.uint16, copy=False))


def list_shards(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    return files


class TokenStream:
    """reads the training shards one after the other, round and round"""

    def __init__(self, pattern: str):
        self.files = list_shards(pattern)
        self.file_idx = 0
        self.tokens = load_shard(self.files[0])
        self.pos = 0

    def _advance_file(self) -> None:
        self.file_idx = (self.file_idx + 1) % len(self.files)
        self.tokens = load_shard(self.files[self.file_idx])
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


class TrainLoader:
    """each rank takes its own slice of a shared contiguous span; one extra token so that targets line up"""

    def __init__(self, pattern: str, ranks: Ranks):
        self.ranks = ranks
        self.stream = TokenStream(pattern)

    def next_batch(self, global_tokens: int, seq_len: int) -> tuple[Tensor, Tensor]:
        local_tokens = global_tokens // (self.ranks.world_size * self.ranks.grad_accum_steps)
        span = local_tokens + 1
        chunk = self.stream.take(span * self.ranks.world_size)
        start = self.ranks.rank * span
        local = chunk[start : start + span].to(dtype=torch.int64)
        x = local[:-1].reshape(-1, seq_len)
        y = local[1:].reshape(-1, seq_len)
        return x.to(self.ranks.device, non_blocking=True), y.to(self.ranks.device, non_blocking=True)


class ValidationSet:
    """the whole validation split: tokens, the bytes of each token, the spans of the documents"""

    def __init__(self, h: Hyperparameters, sp: spm.SentencePieceProcessor):
        if int(sp.vocab_size()) != h.vocab_size:
            raise ValueError(f"VOCAB_SIZE={h.vocab_size} but the tokenizer has {int(sp.vocab_size())} pieces")
        self.files = list_shards(h.val_files)
        self.tokens = torch.cat([load_shard(f) for f in self.files]).to(torch.int64).contiguous()
        self.num_targets = self.tokens.numel() - 1
        if h.val_bytes_files:
            sidecar = torch.cat([load_shard(f) for f in list_shards(h.val_bytes_files)])
            if sidecar.numel() != self.tokens.numel():
                raise ValueError("the byte sidecar does not line up with the validation tokens")
            self.token_bytes = sidecar.to(torch.int64)
        else:
            luts = build_sentencepiece_luts(sp, h.vocab_size)
            self.token_bytes = torch.from_numpy(bytes_of_stream(self.tokens.numpy(), luts))
        self.docs = self._find_documents()

    def _find_documents(self) -> list[tuple[int, int]]:
        """(start, n): inputs tokens[start : start+n], targets tokens[start+1 : start+n+1]"""
        starts = (self.tokens == BOS_ID).nonzero().flatten().tolist()
        if not starts or starts[0] != 0:
            starts.insert(0, 0)
        ends = starts[1:] + [self.num_targets]
        return [(s, e - s) for s, e in zip(starts, ends) if e > s]


# ------------------------------------------------------------------------------------------------
# model
# ------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 master weights, computed in the dtype of the activations"""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self._zero_init = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, rope_dims: int, base: float):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(seq_len, device=device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(device))
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rope_dims: int) -> Tensor:
    rot, rest = x[..., :rope_dims], x[..., rope_dims:]
    half = rope_dims // 2
    x1, x2 = rot[..., :half], rot[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class SmearGate(nn.Module):
    """adds a gated copy of the previous position; nothing is carried over the start of a document"""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.smear = nn.Parameter(torch.full((dim,), init, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.smear).to(x.dtype)
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        keep = (ids != BOS_ID).unsqueeze(-1).to(x.dtype)
        return x + gate * prev * keep


class CausalSelfAttention(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.num_heads, self.num_kv_heads = h.num_heads, h.num_kv_heads
        self.head_dim = h.model_dim // h.num_heads
        self.rope_dims = h.rope_dims
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(h.model_dim, h.model_dim)
        self.c_k = CastedLinear(h.model_dim, kv_dim)
        self.c_v = CastedLinear(h.model_dim, kv_dim)
        self.proj = CastedLinear(h.model_dim, h.model_dim)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), h.qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.rope_dims, h.rope_base)

    def forward(self, x: Tensor, lora: "LayerLoRA | None" = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q, k, v = q + lora.q(x), k + lora.k(x), v + lora.v(x)
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rms_norm(q), rms_norm(k)
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary(q, cos, sin, self.rope_dims) * self.q_gain.to(q.dtype)[None, :, None, None]
        k = apply_rotary(k, cos, sin, self.rope_dims)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads)
        y = y.transpose(1, 2).reshape(bsz, seqlen, dim)
        out = self.proj(y)
        return out if lora is None else out + lora.o(y)


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        self.fc = CastedLinear(dim, int(dim * mult))
        self.proj = CastedLinear(int(dim * mult), dim)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, h: Hyperparameters, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(h)
        self.mlp = MLP(h.model_dim, h.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))
        self.ln_factor = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, lora: "LayerLoRA | None" = None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.ln_factor, lora)
        normed = rms_norm(x) * self.ln_factor
        y = self.mlp(normed)
        if lora is not None:
            y = y + lora.mlp(normed)
        return x + self.mlp_scale.to(x.dtype) * y


class GPT(nn.Module):
    def __init__(self, h: Hyperparameters):
        super().__init__()
        self.softcap = h.logit_softcap
        self.tok_emb = nn.Embedding(h.vocab_size, h.model_dim)
        self.smear_gate = SmearGate(h.model_dim, h.smear_init)
        self.num_encoder = h.num_layers // 2
        self.num_decoder = h.num_layers - self.num_encoder
        num_skips = min(self.num_encoder, self.num_decoder)
        self.skip_weights = nn.Parameter(torch.ones(num_skips, h.model_dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, h.model_dim))
        self.blocks = nn.ModuleList([Block(h, i) for i in range(h.num_layers)])
        self._init_weights(h)

    def _init_weights(self, h: Hyperparameters) -> None:
        nn.init.normal_(self.tok_emb.weight, mean=0.0, std=h.embed_init_std)
        for module in self.modules():
            if isinstance(module, CastedLinear):
                if module._zero_init:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, ids: Tensor, lora: "DocumentLoRA | None" = None) -> Tensor:
        x = rms_norm(self.tok_emb(ids).to(torch.bfloat16))
        x = self.smear_gate(x, ids)
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.num_encoder):
            x = self.blocks[i](x, x0, None if lora is None else lora.layers[i])
            skips.append(x)
        for i in range(self.num_decoder):
            if skips:
                w = self.skip_weights[i].to(x.dtype)
                g = torch.sigmoid(self.skip_gates[i].to(x.dtype))
                x = torch.lerp(w * skips.pop(), x, g)
            j = self.num_encoder + i
            x = self.blocks[j](x, x0, None if lora is None else lora.layers[j])
        return rms_norm(x)

    def logits(self, hidden: Tensor, lora: "DocumentLoRA | None" = None) -> Tensor:
        out = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        if lora is not None:
            out = out + lora.head(hidden)
        return self.softcap * torch.tanh(out.float() / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.hidden(ids))
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))


# ---- adapters for test time: one low-rank pair per document of the batch


class BatchedLoRA(nn.Module):
    def __init__(self, docs: int, d_in: int, d_out: int, rank: int, scale: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(docs, rank, d_in))
        self.B = nn.Parameter(torch.zeros(docs, d_out, rank))
        self.bound, self.scale = 1.0 / math.sqrt(d_in), scale
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.A.uniform_(-self.bound, self.bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.A.to(x.dtype).transpose(1, 2))
        return self.scale * torch.bmm(low, self.B.to(x.dtype).transpose(1, 2))


class LayerLoRA(nn.Module):
    def __init__(self, docs: int, h: Hyperparameters):
        super().__init__()
        dim, kv = h.model_dim, h.num_kv_heads * (h.model_dim // h.num_heads)
        scale = h.ttt_lora_alpha / h.ttt_lora_rank
        self.q = BatchedLoRA(docs, dim, dim, h.ttt_lora_rank, scale)
        self.k = BatchedLoRA(docs, dim, kv, h.ttt_lora_rank, scale)
        self.v = BatchedLoRA(docs, dim, kv, h.ttt_lora_rank, scale)
        self.o = BatchedLoRA(docs, dim, dim, h.ttt_lora_rank, scale)
        self.mlp = BatchedLoRA(docs, dim, dim, h.ttt_lora_rank, scale)


class DocumentLoRA(nn.Module):
    def __init__(self, docs: int, h: Hyperparameters):
        super().__init__()
        self.docs = docs
        self.layers = nn.ModuleList([LayerLoRA(docs, h) for _ in range(h.num_layers)])
        self.head = BatchedLoRA(docs, h.model_dim, h.vocab_size, h.ttt_lora_rank, h.ttt_lora_alpha / h.ttt_lora_rank)


# ------------------------------------------------------------------------------------------------
# weight averaging
# ------------------------------------------------------------------------------------------------


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().float().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(p.detach().float(), alpha=1.0 - self.decay)

    def restart(self, model: nn.Module) -> None:
        for name, p in model.state_dict().items():
            self.shadow[name].copy_(p.detach().float())

    def apply_to(self, model: nn.Module) -> None:
        current = model.state_dict()
        model.load_state_dict({name: t.to(current[name].dtype) for name, t in self.shadow.items()}, strict=True)


# ------------------------------------------------------------------------------------------------
# int6 GPTQ
# ------------------------------------------------------------------------------------------------


def is_quantised(name: str, t: Tensor) -> bool:
    return t.ndim == 2 and t.numel() > 65_536 and not any(c in name for c in CONTROL_NAMES)


class HessianCollector:
    """sums X^T X of the inputs of every linear layer (and of the tied head) over calibration batches"""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.hooks.append(module.register_forward_pre_hook(self._hook(name + ".weight")))

    def _hook(self, name: str):
        def run(_module, args):
            self.add(name, args[0])

        return run

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.size(-1)).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
        self.sums[name].addmm_(x.T, x)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def collect_hessians(h: Hyperparameters, model: GPT, loader: TrainLoader, ranks: Ranks) -> dict[str, Tensor]:
    collector = HessianCollector(model)
    model.eval()
    tokens = h.calib_seqs * h.train_seq_len * ranks.world_size * ranks.grad_accum_steps
    for _ in range(h.calib_batches):
        x, _y = loader.next_batch(tokens, h.train_seq_len)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            collector.add("tok_emb.weight", model.hidden(x))
    collector.close()
    for name in sorted(collector.sums):
        ranks.sum(collector.sums[name])
        collector.sums[name] /= h.calib_batches * ranks.world_size
    return collector.sums


def row_scales(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    qmax = 2 ** (bits - 1) - 1
    clip = torch.minimum(w.abs().amax(dim=1), clip_sigmas * w.std(dim=1))
    return (clip / qmax).clamp_min(1e-7).to(torch.float16)


def gptq_quantise(
    w: Tensor, hessian: Tensor, bits: int, clip_sigmas: float, damp: float, block: int
) -> tuple[Tensor, Tensor]:
    """column by column with error feedback; columns ordered by the Hessian's diagonal"""
    qmax = 2 ** (bits - 1) - 1
    W = w.detach().float().clone()
    H = hessian.float().clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1.0
    W[:, dead] = 0.0
    scale = row_scales(W, bits, clip_sigmas)
    s = scale.float()
    H.diagonal().add_(damp * torch.diag(H).mean())
    perm = torch.argsort(torch.diag(H), descending=True)
    inverse = torch.argsort(perm)
    W, H = W[:, perm], H[perm][:, perm]
    Hinv = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(Hinv, upper=True)
    Q = torch.zeros_like(W, dtype=torch.int8)
    cols = W.size(1)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        part = W[:, start:end].clone()
        errs = torch.zeros_like(part)
        for i in range(end - start):
            d = U[start + i, start + i]
            col = part[:, i].clone()
            q = torch.clamp(torch.round(col / s), -qmax, qmax)
            Q[:, start + i] = q.to(torch.int8)
            err = (col - q * s) / d
            part[:, i:] -= err[:, None] * U[start + i, start + i : end][None, :]
            errs[:, i] = err
        W[:, end:] -= errs @ U[start:end, end:]
    return Q[:, inverse].contiguous(), scale


def quantise_state(h: Hyperparameters, state: dict[str, Tensor], hessians: dict[str, Tensor], log) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, t in state.items():
        if not is_quantised(name, t):
            packed[name + ":raw"] = t.detach().to("cpu", torch.float16).contiguous()
            continue
        emb = name == "tok_emb.weight"
        bits = h.embed_bits if emb else h.matrix_bits
        sigmas = h.embed_clip_sigmas if emb else h.matrix_clip_sigmas
        q, scale = gptq_quantise(t, hessians[name], bits, sigmas, h.gptq_damp, h.gptq_block)
        packed[name + ":q"] = q.cpu()
        packed[name + ":s"] = scale.cpu()
    log(f"gptq:quantised {sum(k.endswith(':q') for k in packed)} matrices, damp:{h.gptq_damp}")
    return packed


def dequantise_state(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, t in packed.items():
        name, kind = key.rsplit(":", 1)
        if kind == "raw":
            state[name] = t.float()
        elif kind == "q":
            state[name] = t.float() * packed[name + ":s"].float()[:, None]
    return state


def byte_shuffle(raw: bytes, stride: int = 2) -> bytes:
    a = np.frombuffer(raw, dtype=np.uint8)
    return b"".join(a[i::stride].tobytes() for i in range(stride))


def byte_unshuffle(raw: bytes, stride: int = 2) -> bytes:
    src = np.frombuffer(raw, dtype=np.uint8)
    out = np.empty_like(src)
    pos = 0
    for i in range(stride):
        n = len(range(i, src.size, stride))
        out[i::stride] = src[pos : pos + n]
        pos += n
    return out.tobytes()


def pack_model(packed: dict[str, Tensor]) -> bytes:
    buf = io.BytesIO()
    torch.save(packed, buf)
    return brotli.compress(byte_shuffle(buf.getvalue()), quality=11)


def unpack_model(blob: bytes) -> dict[str, Tensor]:
    raw = byte_unshuffle(brotli.decompress(blob))
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def write_artifact(h: Hyperparameters, packed: dict[str, Tensor], log) -> str:
    """writes final_model.int6.ptz and prints what counts: this file plus the packed weights"""
    path = os.path.join(h.out_dir, "final_model.int6.ptz")
    blob = pack_model(packed)
    with open(path, "wb") as f:
        f.write(blob)
    code_bytes = len(Path(__file__).read_bytes())
    total = len(blob) + code_bytes
    log(f"Serialized model int6+brotli: {len(blob)} bytes")
    log(f"Code size: {code_bytes} bytes")
    log(f"Total submission size: {total} bytes")
    if total > h.size_limit:
        raise RuntimeError(f"submission is {total - h.size_limit} bytes too large")
    return path


def read_artifact(h: Hyperparameters, path: str, device: torch.device) -> GPT:
    with open(path, "rb") as f:
        blob = f.read()
    model = GPT(h).to(device)
    model.load_state_dict(dequantise_state(unpack_model(blob)), strict=True)
    for p in model.parameters():
        p.requires_grad_(False)
    return model.eval()


# ------------------------------------------------------------------------------------------------
# training
# ------------------------------------------------------------------------------------------------


class Optimizers:
    """MuonEq for the matrices of the blocks, AdamW for the embedding and for everything small"""

    def __init__(self, h: Hyperparameters, model: GPT, ranks: Ranks):
        self.h = h
        named = list(model.blocks.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and not any(c in n for c in CONTROL_NAMES)]
        scalars = [p for n, p in named if p.ndim != 2 or any(c in n for c in CONTROL_NAMES)]
        scalars += [model.skip_weights, model.skip_gates, model.smear_gate.smear]
        betas = (h.beta1, h.beta2)
        self.muon = MuonEq(matrices, h.matrix_lr, h.muon_momentum, h.muon_steps, h.muon_wd, ranks)
        emb = [{"params": [model.tok_emb.weight], "lr": h.embed_lr}]
        self.adam_emb = torch.optim.AdamW(emb, betas=betas, weight_decay=h.adam_wd, fused=True)
        small = [{"params": scalars, "lr": h.scalar_lr}]
        self.adam_small = torch.optim.AdamW(small, betas=betas, weight_decay=h.adam_wd, fused=True)
        self.all = [self.muon, self.adam_emb, self.adam_small]
        for opt in self.all:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]

    def set_schedule(self, step: int, scale: float) -> None:
        frac = min(step / self.h.muon_momentum_warmup, 1.0) if self.h.muon_momentum_warmup > 0 else 1.0
        for group in self.muon.param_groups:
            group["momentum"] = (1 - frac) * self.h.muon_momentum_start + frac * self.h.muon_momentum
        for opt in self.all:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale

    def step(self) -> None:
        for opt in self.all:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.all:
            opt.zero_grad(set_to_none=True)


class Trainer:
    def __init__(self, h: Hyperparameters, ranks: Ranks, log: Logger, val: ValidationSet):
        self.h, self.ranks, self.log, self.val = h, ranks, log, val
        self.model = GPT(h).to(ranks.device).float()
        compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        if ranks.distributed:
            self.net = DDP(compiled, device_ids=[ranks.local_rank], broadcast_buffers=False)
        else:
            self.net = compiled
        self.opts = Optimizers(h, self.model, ranks)
        self.loader = TrainLoader(h.train_files, ranks)
        self.ema = EMA(self.model, h.ema_decay)
        self.train_cap_ms = 1000.0 * (h.max_wallclock_seconds - h.gptq_reserve_seconds)
        self.elapsed_ms = 0.0
        log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        log(f"gptq:reserving {h.gptq_reserve_seconds:.1f}s, training cap {self.train_cap_ms:.0f}ms")

    def lr_scale(self, step: int, elapsed_ms: float) -> float:
        done = max(elapsed_ms / self.train_cap_ms, step / self.h.iterations)
        if done < 1.0 - self.h.warmdown_frac:
            return 1.0
        return max((1.0 - done) / self.h.warmdown_frac, self.h.min_lr)

    def one_step(self) -> Tensor:
        self.opts.zero_grad()
        train_loss = torch.zeros((), device=self.ranks.device)
        for micro in range(self.ranks.grad_accum_steps):
            if self.ranks.distributed:
                self.net.require_backward_grad_sync = micro == self.ranks.grad_accum_steps - 1
            x, y = self.loader.next_batch(self.h.train_batch_tokens, self.h.train_seq_len)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                loss = self.net(x, y)
            train_loss += loss.detach()
            (loss / self.ranks.grad_accum_steps).backward()
        if self.h.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.h.grad_clip)
        self.opts.step()
        return train_loss / self.ranks.grad_accum_steps

    def warmup(self) -> None:
        """compiles everything before the clock starts, then puts weights, optimizers and loader back"""
        if self.h.warmup_steps <= 0:
            return
        weights = {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items()}
        states = [copy.deepcopy(opt.state_dict()) for opt in self.opts.all]
        self.net.train()
        for _ in range(self.h.warmup_steps):
            self.one_step()
        self.model.load_state_dict(weights, strict=True)
        for opt, state in zip(self.opts.all, states, strict=True):
            opt.load_state_dict(state)
        self.opts.zero_grad()
        self.loader = TrainLoader(self.h.train_files, self.ranks)
        self.ema.restart(self.model)
        self.log(f"warmup_step:{self.h.warmup_steps}/{self.h.warmup_steps}")

    def train(self) -> None:
        self.warmup()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step, stop_at = 0, None
        while True:
            last = step == self.h.iterations or (stop_at is not None and step >= stop_at)
            if self.h.val_loss_every > 0 and step % self.h.val_loss_every == 0:
                loss, bpb = plain_validation(self.h, self.model, self.val, self.ranks)
                self.log(f"step:{step}/{self.h.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
                self.net.train()
            if last:
                break
            elapsed_ms = 1000.0 * (time.perf_counter() - started)
            self.opts.set_schedule(step, self.lr_scale(step, elapsed_ms))
            train_loss = self.one_step()
            step += 1
            if step == self.h.ema_start_step:
                self.ema.restart(self.model)
            elif step > self.h.ema_start_step:
                self.ema.update(self.model)
            if step <= 10 or step % self.h.train_log_every == 0:
                torch.cuda.synchronize()
                ms = 1000.0 * (time.perf_counter() - started)
                self.log(
                    f"step:{step}/{self.h.iterations} train_loss:{train_loss.item():.4f} "
                    f"train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms"
                )
            if stop_at is None and step % 4 == 0:
                torch.cuda.synchronize()
                ms = 1000.0 * (time.perf_counter() - started)
                if self.ranks.any(ms >= self.train_cap_ms):
                    stop_at = step
        torch.cuda.synchronize()
        self.elapsed_ms = 1000.0 * (time.perf_counter() - started)
        self.log(f"stopping: step:{step} train_time:{self.elapsed_ms:.0f}ms")
        self.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")

    def finish(self) -> dict[str, Tensor]:
        """EMA weights in, Hessians from training data out; both still on the training clock"""
        started = time.perf_counter()
        self.log("ema:applying averaged weights")
        self.ema.apply_to(self.model)
        hessians = collect_hessians(self.h, self.model, self.loader, self.ranks)
        torch.cuda.synchronize()
        ms = 1000.0 * (time.perf_counter() - started)
        self.elapsed_ms += ms
        self.log(f"gptq:calibration on train shards took {ms:.0f}ms, train+calibration {self.elapsed_ms:.0f}ms")
        if self.elapsed_ms > 1000.0 * self.h.max_wallclock_seconds:
            raise RuntimeError("training and calibration ran past the cap; raise GPTQ_RESERVE_SECONDS")
        return hessians


# ------------------------------------------------------------------------------------------------
# evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_validation(h: Hyperparameters, model: GPT, val: ValidationSet, ranks: Ranks) -> tuple[float, float]:
    """the baseline's eval_val, for the log only: disjoint rows over the stream, no adaptation"""
    rows = val.num_targets // h.eval_seq_len
    first, last = rows * ranks.rank // ranks.world_size, rows * (ranks.rank + 1) // ranks.world_size
    totals = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    model.eval()
    for row in range(first, last, 32):
        a, b = row * h.eval_seq_len, min(row + 32, last) * h.eval_seq_len
        x = val.tokens[a:b].reshape(-1, h.eval_seq_len).to(ranks.device)
        y = val.tokens[a + 1 : b + 1].reshape(-1, h.eval_seq_len).to(ranks.device)
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        totals[0] += loss.double() * y.numel()
        totals[1] += y.numel()
        totals[2] += val.token_bytes[a + 1 : b + 1].sum().item()
    ranks.sum(totals)
    loss_sum, count, num_bytes = totals.tolist()
    return loss_sum / count, loss_sum / math.log(2.0) / num_bytes


class TTTRunner:
    """scores the validation split document by document, in two phases"""

    def __init__(self, h: Hyperparameters, model: GPT, val: ValidationSet, ranks: Ranks, log: Logger):
        self.h, self.model, self.val, self.ranks, self.log = h, model, val, ranks, log
        self.device = ranks.device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.byte_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.token_count = torch.zeros((), dtype=torch.float64, device=self.device)
        self.started = time.perf_counter()
        self.hidden = torch.compile(model.hidden, dynamic=True)
        self.short, self.long = self._split()

    # ---- which documents

    def _split(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        if not self.h.ttt_enabled:
            return list(self.val.docs), []
        short = [d for d in self.val.docs if d[1] < self.h.ttt_min_doc_len]
        long = [d for d in self.val.docs if d[1] >= self.h.ttt_min_doc_len]
        return short, long

    def _mine(self, things: list) -> list:
        return things[self.ranks.rank :: self.ranks.world_size]

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    # ---- the ledger

    def _token_nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        scaled = logits.float() * self.h.logit_scale
        return F.cross_entropy(scaled.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def _tally(self, nll: Tensor, positions: Tensor, mask: Tensor) -> None:
        """positions: index in the stream of every target; mask: which of them count now"""
        self.loss_sum += nll.double()[mask].sum()
        self.byte_sum += self.val.token_bytes[positions[mask].cpu()].sum().item()
        self.token_count += mask.sum()

    # ---- phase 1: short documents, frozen weights

    def _windows(self, docs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(start, length, first scored offset); every target of a document falls to exactly one window"""
        size, stride = self.h.eval_seq_len, self.h.eval_stride
        out = []
        for start, n in docs:
            out.append((start, min(n, size), 0))
            done = size
            while done < n:
                end = min(done + stride, n)
                out.append((start + end - size, size, size - (end - done)))
                done = end
        return out

    def _window_batch(self, batch: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width = max(length for _, length, _ in batch)
        x = torch.full((len(batch), width), BOS_ID, dtype=torch.int64)
        y = torch.zeros((len(batch), width), dtype=torch.int64)
        positions = torch.zeros((len(batch), width), dtype=torch.int64)
        mask = torch.zeros((len(batch), width), dtype=torch.bool)
        for i, (start, length, scored_from) in enumerate(batch):
            x[i, :length] = self.val.tokens[start : start + length]
            y[i, :length] = self.val.tokens[start + 1 : start + length + 1]
            positions[i, :length] = torch.arange(start + 1, start + length + 1)
            mask[i, scored_from:length] = True
        return x.to(self.device), y.to(self.device), positions.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def score_short(self) -> None:
        windows = sorted(self._mine(self._windows(self.short)), key=lambda w: w[1])
        for i in range(0, len(windows), self.h.eval_batch_windows):
            x, y, positions, mask = self._window_batch(windows[i : i + self.h.eval_batch_windows])
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = self.model.logits(self.hidden(x))
            window_nll = self._token_nll(logits, y)
            self._tally(window_nll, positions, mask)
        self.log(f"ttt:phase 1 done, short documents:{len(self.short)} t:{self._seconds():.1f}s")

    # ---- phase 2: long documents, one LoRA each

    def _batches(self) -> list[list[tuple[int, int]]]:
        """documents of about the same length share a batch; they share nothing else"""
        docs = sorted(self.long, key=lambda d: (d[1], d[0]))
        size = self.h.ttt_batch_docs
        return [docs[i : i + size] for i in range(0, len(docs), size)]

    def _fresh_lora(self, count: int) -> tuple[DocumentLoRA, torch.optim.Optimizer]:
        lora = DocumentLoRA(count, self.h).to(self.device)
        opt = torch.optim.AdamW(
            lora.parameters(),
            lr=self.h.ttt_lora_lr,
            betas=(self.h.ttt_beta1, self.h.ttt_beta2),
            eps=1e-10,
            weight_decay=self.h.ttt_wd,
            fused=True,
        )
        return lora, opt

    def _chunk(self, docs: list[tuple[int, int]], index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """inputs end with the chunk; targets, positions and mask cover the chunk alone"""
        begin = index * self.h.ttt_chunk
        end = begin + self.h.ttt_chunk
        left = max(0, end - self.h.eval_seq_len)
        x = torch.full((len(docs), end - left), BOS_ID, dtype=torch.int64)
        y = torch.zeros((len(docs), end - begin), dtype=torch.int64)
        positions = torch.zeros_like(y)
        mask = torch.zeros_like(y, dtype=torch.bool)
        for i, (start, n) in enumerate(docs):
            stop = min(end, n)
            if stop <= begin:
                continue
            x[i, : stop - left] = self.val.tokens[start + left : start + stop]
            y[i, : stop - begin] = self.val.tokens[start + begin + 1 : start + stop + 1]
            positions[i, : stop - begin] = torch.arange(start + begin + 1, start + stop + 1)
            mask[i, : stop - begin] = True
        return x.to(self.device), y.to(self.device), positions.to(self.device), mask.to(self.device)

    def _chunk_logits(self, x: Tensor, width: int, lora: DocumentLoRA | None) -> Tensor:
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            return self.model.logits(self.hidden(x, lora)[:, -width:], lora)

    @torch.no_grad()
    def _score_chunk(self, lora: DocumentLoRA, chunk: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, y, positions, mask = chunk
        logits = self._chunk_logits(x, y.size(1), lora)
        chunk_nll = self._token_nll(logits, y)
        self._tally(chunk_nll, positions, mask)

    def _adapt(self, lora: DocumentLoRA, opt: torch.optim.Optimizer, chunk: tuple[Tensor, ...], learns: Tensor) -> None:
        """a few steps on a chunk that has just been scored, for the documents that go on after it"""
        x, y, _positions, mask = chunk
        weight = (mask & learns[:, None]).float()
        for _ in range(self.h.ttt_epochs):
            opt.zero_grad(set_to_none=True)
            logits = self._chunk_logits(x, y.size(1), lora)
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(weight)
            loss = ((nll * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)).sum()
            loss.backward()
            opt.step()

    def _score_batch(self, docs: list[tuple[int, int]]) -> None:
        lora, opt = self._fresh_lora(len(docs))
        lengths = torch.tensor([n for _, n in docs], device=self.device)
        num_chunks = -(-max(n for _, n in docs) // self.h.ttt_chunk)
        for index in range(num_chunks):
            chunk = self._chunk(docs, index)
            self._score_chunk(lora, chunk)
            learns = lengths > (index + 1) * self.h.ttt_chunk
            if index + 1 < num_chunks and self._seconds() < self.h.eval_budget_seconds:
                self._adapt(lora, opt, chunk, learns)

    def score_long(self) -> None:
        batches = self._mine(self._batches()[::-1])
        for i, docs in enumerate(batches):
            self._score_batch(docs)
            if i % 10 == 0:
                self.log(f"ttt:batch {i + 1}/{len(batches)} longest:{docs[-1][1]} t:{self._seconds():.1f}s")
        self.log(f"ttt:phase 2 done, long documents:{len(self.long)} t:{self._seconds():.1f}s")

    # ---- all of it

    def warm_up(self) -> None:
        """compiles the evaluation's graphs on made-up tokens"""
        docs, width = self.h.ttt_batch_docs, self.h.ttt_chunk
        x = torch.randint(0, self.h.vocab_size, (docs, self.h.eval_seq_len), device=self.device)
        y = torch.randint(0, self.h.vocab_size, (docs, width), device=self.device)
        lora, opt = self._fresh_lora(docs)
        everyone = torch.ones(docs, dtype=torch.bool, device=self.device)
        self._adapt(lora, opt, (x, y, y, torch.ones_like(y, dtype=torch.bool)), everyone)
        with torch.no_grad(), torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            self.hidden(x)
        torch.cuda.synchronize()

    def run(self) -> tuple[float, float]:
        self.warm_up()
        self.score_short()
        self.score_long()
        return self.result()

    def result(self) -> tuple[float, float]:
        for total in (self.loss_sum, self.byte_sum, self.token_count):
            self.ranks.sum(total)
        if int(self.token_count.item()) != self.val.num_targets:
            raise RuntimeError(f"scored {int(self.token_count.item())} targets of {self.val.num_targets}")
        loss = (self.loss_sum / self.token_count).item()
        bpb = (self.loss_sum / math.log(2.0) / self.byte_sum).item()
        return loss, bpb


# ------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------


def set_up(h: Hyperparameters, ranks: Ranks) -> Logger:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(h.seed)
    np.random.seed(h.seed)
    torch.manual_seed(h.seed)
    torch.cuda.manual_seed_all(h.seed)
    log = Logger(os.path.join("logs", f"{h.run_id}.txt") if ranks.master else None)
    log(Path(__file__).read_text(encoding="utf-8"), console=False)
    log(f"Running Python {sys.version}", console=False)
    log(f"Running PyTorch {torch.__version__}")
    log(f"world_size:{ranks.world_size} grad_accum_steps:{ranks.grad_accum_steps} seed:{h.seed}")
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            log(f"  {name}: {getattr(h, name)}", console=False)
    return log


def load_validation(h: Hyperparameters, log: Logger) -> ValidationSet:
    sp = spm.SentencePieceProcessor(model_file=h.tokenizer_path)
    val = ValidationSet(h, sp)
    log(f"val:shards:{len(val.files)} tokens:{val.tokens.numel()} documents:{len(val.docs)}")
    log(f"val:bytes:{int(val.token_bytes[1:].sum())}")
    return val


def evaluate(h: Hyperparameters, path: str, val: ValidationSet, ranks: Ranks, log: Logger) -> tuple[float, float]:
    """reads the packed model back and scores it; everything below runs on the evaluation clock"""
    started = time.perf_counter()
    model = read_artifact(h, path, ranks.device)
    loss, bpb = plain_validation(h, model, val, ranks)
    log(f"final_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} (no adaptation, for the log)")
    runner = TTTRunner(h, model, val, ranks, log)
    runner.started = started
    loss, bpb = runner.run()
    torch.cuda.synchronize()
    log(f"eval_time:{1000.0 * (time.perf_counter() - started):.0f}ms")
    return loss, bpb


def main() -> None:
    h = Hyperparameters()
    ranks = Ranks()
    log = set_up(h, ranks)
    val = load_validation(h, log)

    trainer = Trainer(h, ranks, log, val)
    trainer.train()
    hessians = trainer.finish()

    path = os.path.join(h.out_dir, "final_model.int6.ptz")
    if ranks.master:
        packed = quantise_state(h, trainer.model.state_dict(), hessians, log)
        write_artifact(h, packed, log)
    ranks.barrier()
    del trainer, hessians
    torch.cuda.empty_cache()

    loss, bpb = evaluate(h, path, val, ranks, log)
    log(f"final_ttt val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    log(f"final_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    ranks.close()


if __name__ == "__main__":
    main()
