"""
train_gpt.py: 10-layer GPT, Muon + AdamW, EMA, late QAT, int6 + lzma artifact, sliding-window evaluation of the artifact.

Descends from the modded-nanogpt style baseline. Everything that counts lives in this file; run with
    torchrun --standalone --nproc_per_node=8 train_gpt.py
"""

from __future__ import annotations

import copy
import glob
import io
import lzma
import math
import os
import random
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
# HYPERPARAMETERS
# -----------------------------


class Hyperparameters:
    # Data and tokenizer.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Logging and in-training validation (for the log only).
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 4000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 500))

    # Training length. The cap leaves room for quantisation and writing.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3000))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 786_432))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 570.0))

    # Model shape.
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
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))

    # Optimizers.
    embed_lr = float(os.environ.get("EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_start = float(os.environ.get("MUON_MOMENTUM_START", 0.92))
    muon_momentum_warmup = int(os.environ.get("MUON_MOMENTUM_WARMUP", 1500))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.04))
    adam_weight_decay = float(os.environ.get("ADAM_WEIGHT_DECAY", 0.04))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    ema_decay = float(os.environ.get("EMA_DECAY", 0.997))
    late_qat_threshold = float(os.environ.get("LATE_QAT_THRESHOLD", 0.15))

    # Artifact and its evaluation.
    artifact_path = os.environ.get("ARTIFACT_PATH", "final_model.int6.ptz")
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 2048))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch = int(os.environ.get("EVAL_BATCH", 32))


# -----------------------------
# MUON
# -----------------------------


def zeropower_via_newtonschulz5(grad: Tensor, steps: int, eps: float = 1e-7) -> Tensor:
    """Orthogonalises a matrix: a quintic Newton-Schulz iteration in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + eps)
    flipped = x.size(0) > x.size(1)
    if flipped:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        poly = b * gram + c * gram @ gram
        x = a * x + poly @ x
    return x.T if flipped else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation; the matrices are dealt out over the ranks and the updates summed."""

    def __init__(self, params, lr: float, momentum: float, backend_steps: int, weight_decay: float = 0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, backend_steps=backend_steps, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self, closure=None):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            cursor = 0
            for i, p in enumerate(params):
                if i % world_size == rank:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    buf = state["momentum_buffer"]
                    buf.mul_(group["momentum"]).add_(p.grad)
                    g = p.grad.add(buf, alpha=group["momentum"])
                    g = zeropower_via_newtonschulz5(g, steps=group["backend_steps"])
                    g = g * max(1, g.size(0) / g.size(1)) ** 0.5
                    flat[cursor : cursor + p.numel()] = g.reshape(-1)
                cursor += p.numel()
            if distributed:
                dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            cursor = 0
            for p in params:
                g = flat[cursor : cursor + p.numel()].view_as(p).to(p.dtype)
                if group["weight_decay"] > 0:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(g, alpha=-group["lr"])
                cursor += p.numel()


# -----------------------------
# DATA
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    """One shard: 256 int32 of header (magic, version, token count), then uint16 tokens."""
    header = np.fromfile(file, dtype="<i4", count=256)
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"unexpected shard header: {file}")
    count = int(header[2])
    tokens = np.fromfile(file, dtype="<u2", count=count, offset=256 * 4)
    if tokens.size != count:
        raise ValueError(f"short read: {file}")
    return torch.from_numpy(tokens.astype(np.int32))


def shard_list(pattern: str) -> list[Path]:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no files match {pattern}")
    return files


def load_validation_tokens(pattern: str) -> Tensor:
    """The whole validation stream, in order."""
    return torch.cat([load_data_shard(f) for f in shard_list(pattern)]).contiguous()


class TokenStream:
    """Reads the shards one after another, for ever."""

    def __init__(self, pattern: str):
        self.files = shard_list(pattern)
        self.index = 0
        self.tokens = load_data_shard(self.files[0])
        self.pos = 0

    def take(self, n: int) -> Tensor:
        parts = []
        while n > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.index = (self.index + 1) % len(self.files)
                self.tokens = load_data_shard(self.files[self.index])
                self.pos = 0
                continue
            k = min(n, left)
            parts.append(self.tokens[self.pos : self.pos + k])
            self.pos += k
            n -= k
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class DistributedTokenLoader:
    """Every rank reads the same stream and takes its own disjoint span of each batch."""

    def __init__(self, pattern: str, rank: int, world_size: int, device: torch.device):
        self.stream = TokenStream(pattern)
        self.rank, self.world_size, self.device = rank, world_size, device

    def next_batch(self, global_tokens: int, seq_len: int, accum: int) -> tuple[Tensor, Tensor]:
        local = global_tokens // (self.world_size * accum)
        span = local + 1
        chunk = self.stream.take(span * self.world_size)
        mine = chunk[self.rank * span : (self.rank + 1) * span].to(self.device, torch.int64, non_blocking=True)
        return mine[:-1].view(-1, seq_len), mine[1:].view(-1, seq_len)


# -----------------------------
# BYTES OF TOKENS
# -----------------------------


class ByteTable:
    """How many bytes of the original text a token stands for, given the token before it."""

    def __init__(self, sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device):
        size = max(int(sp.vocab_size()), vocab_size)
        base = np.zeros(size, dtype=np.int64)
        space = np.zeros(size, dtype=bool)
        edge = np.ones(size, dtype=bool)
        for token in range(int(sp.vocab_size())):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                continue
            edge[token] = False
            if sp.is_byte(token):
                base[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece.startswith("\u2581"):
                space[token] = True
                piece = piece[1:]
            base[token] = len(piece.encode("utf-8"))
        self.base = torch.tensor(base, device=device)
        self.space = torch.tensor(space, device=device)
        self.edge = torch.tensor(edge, device=device)

    def count(self, prev: Tensor, target: Tensor) -> Tensor:
        return self.base[target] + (self.space[target] & ~self.edge[prev]).to(torch.int64)


# -----------------------------
# MODEL
# -----------------------------


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """Weights live in fp32 and are cast at use; late in training they pass a fake int6 quantiser."""

    qat = False

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if CastedLinear.qat and self.training and w.ndim == 2:
            with torch.no_grad():
                scale = (w.abs().amax(dim=1) / 31.0).clamp_min(1.0 / 31.0 / 1024)
                rounded = torch.clamp(torch.round(w / scale[:, None]), -32, 31) * scale[:, None]
            w = w + (rounded - w).detach()
        return F.linear(x, w.to(x.dtype))


class Rotary(nn.Module):
    """Rotates the first `dims` of each head."""

    def __init__(self, dims: int, base: float):
        super().__init__()
        self.dims = dims
        inv_freq = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = torch.arange(length, device=device, dtype=torch.float32)
        freqs = torch.outer(t, self.inv_freq.to(device))
        return freqs.cos()[None, None].to(dtype), freqs.sin()[None, None].to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim = args.model_dim
        self.heads, self.kv_heads = args.num_heads, args.num_kv_heads
        self.head_dim = dim // args.num_heads
        kv = self.kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv, bias=False)
        self.c_v = CastedLinear(dim, kv, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj.zero_init = True
        self.q_gain = nn.Parameter(torch.full((args.num_heads,), args.qk_gain_init))
        self.rotary = Rotary(args.rope_dims, args.rope_base)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q = self.c_q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        cos, sin = self.rotary(t, x.device, q.dtype)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, dim: int, mult: int):
        super().__init__()
        self.fc = CastedLinear(dim, mult * dim, bias=False)
        self.proj = CastedLinear(mult * dim, dim, bias=False)
        self.proj.zero_init = True

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
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.ln_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.attn_norm(x) * self.ln_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.mlp_norm(x) * self.ln_scale)


class GPT(nn.Module):
    """trunk: ids to the normed last hidden state; logits: hidden state to softcapped logits (tied head)."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.softcap = args.logit_softcap
        self.tok_emb = nn.Embedding(args.vocab_size, args.model_dim)
        self.encoder_layers = args.num_layers // 2
        self.decoder_layers = args.num_layers - self.encoder_layers
        skips = min(self.encoder_layers, self.decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(skips, args.model_dim))
        self.blocks = nn.ModuleList(Block(args, i) for i in range(args.num_layers))
        self.final_norm = RMSNorm()
        self.final_gain = nn.Parameter(torch.ones(args.model_dim))
        self._init_weights(args)

    def _init_weights(self, args: Hyperparameters) -> None:
        nn.init.normal_(self.tok_emb.weight, std=args.tied_embed_init_std)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "zero_init", False):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def trunk(self, ids: Tensor) -> Tensor:
        x = F.rms_norm(self.tok_emb(ids), (self.tok_emb.weight.size(1),))
        x0 = x
        skips: list[Tensor] = []
        for i in range(self.encoder_layers):
            x = self.blocks[i](x, x0)
            skips.append(x)
        for i in range(self.decoder_layers):
            if skips:
                x = x + self.skip_weights[i].to(x.dtype) * skips.pop()
            x = self.blocks[self.encoder_layers + i](x, x0)
        return self.final_norm(x) * self.final_gain.to(x.dtype)

    def logits(self, h: Tensor) -> Tensor:
        raw = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.trunk(ids))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# -----------------------------
# QUANTISATION AND ARTIFACT
# -----------------------------

CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "final_gain")
CLIP_PERCENTILES = (0.9990, 0.9995, 0.9999, 0.99999, 1.0)


def quantise_rows(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Symmetric per-row integers in [-top - 1, top]; for each row the clip with the smallest squared error."""
    w = w.float()
    best_q, best_s, best_err = None, None, None
    for pct in CLIP_PERCENTILES:
        clip = torch.quantile(w.abs(), pct, dim=1) if pct < 1.0 else w.abs().amax(dim=1)
        scale = (clip / top).clamp_min(1e-8).to(torch.float16)
        q = torch.clamp(torch.round(w / scale.float()[:, None]), -top - 1, top)
        err = (w - q * scale.float()[:, None]).square().sum(dim=1)
        if best_err is None:
            best_q, best_s, best_err = q, scale, err
        else:
            better = err < best_err
            best_q = torch.where(better[:, None], q, best_q)
            best_s = torch.where(better, scale, best_s)
            best_err = torch.where(better, err, best_err)
    return best_q.to(torch.int8), best_s


def quantise_state(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """int6 for the matrices, int8 for the embedding, fp16 or fp32 for the small rest."""
    out: dict[str, dict[str, Tensor]] = {"q": {}, "s": {}, "raw": {}}
    for name, tensor in state.items():
        t = tensor.detach().cpu()
        if not t.is_floating_point() or t.ndim != 2 or t.numel() <= 65_536:
            control = any(key in name for key in CONTROL_NAMES)
            out["raw"][name] = t.float() if control or not t.is_floating_point() else t.to(torch.float16)
            continue
        q, s = quantise_rows(t, top=127 if "tok_emb" in name else 31)
        out["q"][name], out["s"][name] = q, s
    return out


def dequantise_state(packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    state = {name: q.float() * packed["s"][name].float()[:, None] for name, q in packed["q"].items()}
    state.update({name: t.float() for name, t in packed["raw"].items()})
    return state


def write_artifact(path: str, state: dict[str, Tensor]) -> int:
    buffer = io.BytesIO()
    torch.save(quantise_state(state), buffer)
    blob = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    Path(path).write_bytes(blob)
    return len(blob)


def read_artifact(path: str) -> dict[str, Tensor]:
    blob = lzma.decompress(Path(path).read_bytes())
    return dequantise_state(torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True))


# -----------------------------
# EVALUATION
# -----------------------------


def window_plan(n: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, end, first) over n targets: inputs start..end-1, of which first.. are new in this window.

    The first window is new as a whole, later ones in their last `stride` positions, the last one in what is left.
    """
    plan = []
    done = 0
    while done < n:
        end = min(done + (seq_len if done == 0 else stride), n)
        plan.append((max(0, end - seq_len), end, done))
        done = end
    return plan


def share(items: list, rank: int, world_size: int) -> list:
    """This rank's contiguous part of a list."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def stack_windows(tokens: Tensor, group: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows of one length."""
    both = torch.stack([tokens[start : end + 1] for start, end, _ in group]).to(device, torch.int64)
    return both[:, :-1], both[:, 1:]


def reduce_score(loss_sum: float, tokens: float, nbytes: float, device: torch.device) -> tuple[float, float]:
    """Sums over the ranks: mean loss in nats per token, bits per byte."""
    totals = torch.tensor([loss_sum, tokens, nbytes], dtype=torch.float64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return float(totals[0] / totals[1]), float(totals[0] / math.log(2.0) / totals[2])


def eval_log_only(args, model, val_tokens, table, rank, world_size, device) -> tuple[float, float]:
    """Plain windows without overlap, for the training log."""
    mine = share(window_plan(val_tokens.numel() - 1, args.train_seq_len, args.train_seq_len), rank, world_size)
    loss_sum = tokens = nbytes = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for start, end, first in mine:
            x, y = stack_windows(val_tokens, [(start, end, first)], device)
            logits = model.logits(model.trunk(x)).float()
            nll = F.cross_entropy(logits[0], y[0], reduction="none")[first - start :]
            loss_sum += nll.double().sum().item()
            tokens += nll.numel()
            nbytes += table.count(x[0], y[0])[first - start :].sum().item()
    model.train()
    return reduce_score(loss_sum, tokens, nbytes, device)


def evaluate(args, model, val_tokens, table, rank, world_size, device) -> tuple[float, float]:
    """Sliding windows over the whole validation stream."""
    mine = share(window_plan(val_tokens.numel() - 1, args.eval_seq_len, args.eval_stride), rank, world_size)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    byte_sum = torch.zeros((), dtype=torch.int64, device=device)
    tokens = 0
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for i in range(0, len(mine), args.eval_batch):
            group = mine[i : i + args.eval_batch]
            x, y = stack_windows(val_tokens, group, device)
            logits = model.logits(model.trunk(x)).float()
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
            offsets = torch.tensor([first - start for start, _, first in group], device=device)
            new = torch.arange(y.size(1), device=device)[None] >= offsets[:, None]
            loss_sum += nll.double()[new].sum()
            byte_sum += table.count(x, y)[new].sum()
            tokens += int(new.sum())
    return reduce_score(loss_sum.item(), tokens, byte_sum.item(), device)


# -----------------------------
# TRAINING
# -----------------------------


class WeightEMA:
    """Exponential moving average of all weights, in fp32."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].mul_(self.decay).add_(t.detach().float(), alpha=1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict({name: t.clone() for name, t in self.shadow.items()}, strict=True)


def build_optimizers(args: Hyperparameters, model: GPT) -> list[torch.optim.Optimizer]:
    named = list(model.blocks.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and not any(k in name for k in CONTROL_NAMES)]
    scalars = [p for name, p in named if p.ndim != 2 or any(k in name for k in CONTROL_NAMES)]
    scalars += [model.skip_weights, model.final_gain]
    adam = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, weight_decay=args.adam_weight_decay, fused=True)
    optimizers = [
        torch.optim.AdamW([{"params": [model.tok_emb.weight], "lr": args.embed_lr}], **adam),
        torch.optim.AdamW([{"params": scalars, "lr": args.scalar_lr}], **adam),
        Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_weight_decay),
    ]
    for opt in optimizers:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_scale(args: Hyperparameters, step: int, elapsed: float) -> float:
    """1, then linearly down to 0 over the last warmdown_iters, whichever of steps and clock ends first."""
    if args.warmdown_iters <= 0:
        return 1.0
    if args.max_wallclock_seconds <= 0 or step == 0:
        left = args.iterations - step
        return min(1.0, max(0.0, left / args.warmdown_iters))
    per_step = elapsed / step
    warmdown = args.warmdown_iters * per_step
    left = max(0.0, args.max_wallclock_seconds - elapsed)
    return left / max(warmdown, 1e-9) if left <= warmdown else 1.0


class Log:
    """Prints on rank 0 and writes a file beside it."""

    def __init__(self, run_id: str, master: bool):
        self.master = master
        self.path = Path("logs") / f"{run_id}.txt"
        if master:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, text: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(text, flush=True)
        with self.path.open("a") as file:
            print(text, file=file)


def train_step(args, model, loader, optimizers, accum: int) -> Tensor:
    """One update from `accum` micro-batches; returns the mean loss."""
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    total = torch.zeros((), device=loader.device)
    for micro in range(accum):
        if isinstance(model, DDP):
            model.require_backward_grad_sync = micro == accum - 1
        x, y = loader.next_batch(args.train_batch_tokens, args.train_seq_len, accum)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        (loss / accum).backward()
        total += loss.detach() / accum
    return total


def warm_up(args, base, model, loader_of, optimizers, accum: int) -> None:
    """Compiles and primes the kernels on training batches; weights and optimizer states are put back afterwards."""
    weights = {name: t.detach().cpu().clone() for name, t in base.state_dict().items()}
    states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
    loader = loader_of()
    for _ in range(args.warmup_steps):
        train_step(args, model, loader, optimizers, accum)
        for opt in optimizers:
            opt.step()
    base.load_state_dict(weights, strict=True)
    for opt, state in zip(optimizers, states):
        opt.load_state_dict(state)
        opt.zero_grad(set_to_none=True)


def train(args, base, val_tokens, table, rank, world_size, device, log) -> WeightEMA:
    """Trains until the wall-clock cap; the clock stands still while the log's validation runs."""
    accum = max(1, 8 // world_size)
    compiled = torch.compile(base, dynamic=False, fullgraph=True)
    model = DDP(compiled, device_ids=[device.index], broadcast_buffers=False) if world_size > 1 else compiled
    optimizers = build_optimizers(args, base)

    def loader_of() -> DistributedTokenLoader:
        return DistributedTokenLoader(args.train_files, rank, world_size, device)

    if args.warmup_steps > 0:
        warm_up(args, base, model, loader_of, optimizers, accum)
    loader = loader_of()
    ema = WeightEMA(base, args.ema_decay)
    base.train()
    torch.cuda.synchronize()
    training_time = 0.0
    t0 = time.perf_counter()
    step = 0
    stop_at: int | None = None
    while True:
        last = step == args.iterations or (stop_at is not None and step >= stop_at)
        if last or (args.val_loss_every > 0 and step > 0 and step % args.val_loss_every == 0):
            torch.cuda.synchronize()
            training_time += time.perf_counter() - t0
            loss, bpb = eval_log_only(args, base, val_tokens, table, rank, world_size, device)
            log(f"step:{step}/{args.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{training_time:.1f}s")
            torch.cuda.synchronize()
            t0 = time.perf_counter()
        if last:
            break
        elapsed = training_time + time.perf_counter() - t0
        scale = lr_scale(args, step, elapsed)
        if not CastedLinear.qat and scale < args.late_qat_threshold:
            CastedLinear.qat = True
            log(f"late_qat:on step:{step} scale:{scale:.4f}")
        loss = train_step(args, model, loader, optimizers, accum)
        frac = min(1.0, step / max(1, args.muon_momentum_warmup))
        momentum = (1 - frac) * args.muon_momentum_start + frac * args.muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
                if isinstance(opt, Muon):
                    group["momentum"] = momentum
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        ema.update(base)
        step += 1
        elapsed = training_time + time.perf_counter() - t0
        if step <= 10 or step % args.train_log_every == 0:
            log(f"step:{step}/{args.iterations} train_loss:{loss.item():.4f} train_time:{elapsed:.1f}s")
        capped = torch.tensor(int(args.max_wallclock_seconds > 0 and elapsed >= args.max_wallclock_seconds), device=device)
        if world_size > 1:
            dist.all_reduce(capped, op=dist.ReduceOp.MAX)
        if stop_at is None and int(capped.item()):
            stop_at = step
    log(f"train_done step:{step} train_time:{training_time:.1f}s")
    CastedLinear.qat = False
    return ema


# -----------------------------
# MAIN
# -----------------------------


def main() -> None:
    args = Hyperparameters()
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if 8 % world_size != 0:
        raise ValueError("WORLD_SIZE must divide 8")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    log = Log(args.run_id, rank == 0)
    code = Path(__file__).read_text(encoding="utf-8")
    log(code, console=False)

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} but the tokenizer has {int(sp.vocab_size())}")
    table = ByteTable(sp, args.vocab_size, device)
    val_tokens = load_validation_tokens(args.val_files)
    log(f"val_tokens:{val_tokens.numel()} train_shards:{len(shard_list(args.train_files))}")

    model = GPT(args).to(device)
    log(f"params:{sum(p.numel() for p in model.parameters())} world_size:{world_size} seed:{args.seed}")
    ema = train(args, model, val_tokens, table, rank, world_size, device, log)
    ema.copy_to(model)

    if rank == 0:
        size = write_artifact(args.artifact_path, model.state_dict())
        code_bytes = len(code.encode("utf-8"))
        log(f"artifact:{size} bytes code:{code_bytes} bytes total:{size + code_bytes} bytes (limit 16000000)")
    if distributed:
        dist.barrier()

    # What is scored is the file, read back from disk.
    del model, ema
    scored = GPT(args).to(device)
    scored.load_state_dict(read_artifact(args.artifact_path), strict=True)
    torch.cuda.synchronize()
    t0 = time.perf_counter()
    val_loss, val_bpb = evaluate(args, scored, val_tokens, table, rank, world_size, device)
    torch.cuda.synchronize()
    log(f"final_int6_eval val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{1000 * (time.perf_counter() - t0):.0f}ms")
    log(f"final_int6_eval_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
