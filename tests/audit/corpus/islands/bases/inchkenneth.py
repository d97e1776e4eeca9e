"""
Parameter Golf submission: int6 rows, fp16 embedding, 3x MLP, SWA, stride-64 scoring and per-document LoRA.

Grown from the repository's baseline `train_gpt.py`; most names are kept so that a diff stays readable.
The order of events is: train (wall-clock capped) -> SWA -> clip search on train activations -> artifact
-> read the artifact back -> plain / sliding / LoRA evaluation of what was read back.
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
import zlib
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


# -----------------------------
# HYPERPARAMETERS
# -----------------------------
# Default run:
# - 9 blocks, width 512, 8 heads over 4 KV heads, 3x relu^2 MLP, tied embedding of 1024 pieces
# - 524,288 train tokens per step at sequence length 1024, about 13k steps within the cap
# - the last `quant_reserve_seconds` of the cap belong to calibration and packing


class Hyperparameters:
    # Data.
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
    train_files = os.path.join(data_path, "fineweb_train_*.bin")
    val_files = os.path.join(data_path, "fineweb_val_*.bin")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))

    # Validation while training: a progress figure, nothing is decided by it.
    val_batch_size = int(os.environ.get("VAL_BATCH_SIZE", 524_288))
    val_loss_every = int(os.environ.get("VAL_LOSS_EVERY", 2000))
    train_log_every = int(os.environ.get("TRAIN_LOG_EVERY", 200))

    # Length of training.
    iterations = int(os.environ.get("ITERATIONS", 20000))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 2400))
    warmup_steps = int(os.environ.get("WARMUP_STEPS", 20))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 524_288))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    quant_reserve_seconds = float(os.environ.get("QUANT_RESERVE_SECONDS", 30.0))

    # Model shape.
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    num_kv_heads = int(os.environ.get("NUM_KV_HEADS", 4))
    model_dim = int(os.environ.get("MODEL_DIM", 512))
    num_heads = int(os.environ.get("NUM_HEADS", 8))
    mlp_mult = int(os.environ.get("MLP_MULT", 3))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    rope_base = float(os.environ.get("ROPE_BASE", 10000.0))
    logit_softcap = float(os.environ.get("LOGIT_SOFTCAP", 30.0))
    qk_gain_init = float(os.environ.get("QK_GAIN_INIT", 1.5))

    # Optimisers.
    embed_lr = float(os.environ.get("EMBED_LR", 0.6))
    head_lr = float(os.environ.get("HEAD_LR", 0.008))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.03))
    tied_embed_init_std = float(os.environ.get("TIED_EMBED_INIT_STD", 0.005))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.98))
    muon_backend_steps = int(os.environ.get("MUON_BACKEND_STEPS", 5))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.9))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1200))
    muon_weight_decay = float(os.environ.get("MUON_WEIGHT_DECAY", 0.02))
    beta1 = float(os.environ.get("BETA1", 0.9))
    beta2 = float(os.environ.get("BETA2", 0.95))
    adam_eps = float(os.environ.get("ADAM_EPS", 1e-8))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))

    # Stochastic weight averaging over the tail of the warmdown.
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_start_scale = float(os.environ.get("SWA_START_SCALE", 0.5))
    swa_every = int(os.environ.get("SWA_EVERY", 50))

    # Packing.
    calib_steps = int(os.environ.get("CALIB_STEPS", 24))
    calib_batch_tokens = int(os.environ.get("CALIB_BATCH_TOKENS", 262_144))
    zstd_level = int(os.environ.get("ZSTD_LEVEL", 22))
    size_limit_bytes = int(os.environ.get("SIZE_LIMIT_BYTES", 16_000_000))

    # Evaluation of the packed model.
    eval_seq_len = int(os.environ.get("EVAL_SEQ_LEN", 1024))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    eval_batch_seqs = int(os.environ.get("EVAL_BATCH_SEQS", 256))
    bos_id = int(os.environ.get("BOS_ID", 1))

    # Per-document LoRA at evaluation.
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))
    ttt_lora_rank = int(os.environ.get("TTT_LORA_RANK", 8))
    ttt_lora_lr = float(os.environ.get("TTT_LORA_LR", 0.01))
    ttt_chunk_size = int(os.environ.get("TTT_CHUNK_SIZE", 256))
    ttt_eval_seq_len = int(os.environ.get("TTT_EVAL_SEQ_LEN", 1024))
    ttt_batch_size = int(os.environ.get("TTT_BATCH_SIZE", 64))
    ttt_beta1 = float(os.environ.get("TTT_BETA1", 0.9))
    ttt_beta2 = float(os.environ.get("TTT_BETA2", 0.95))


# -----------------------------
# MUON OPTIMIZER
# -----------------------------


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 10, eps: float = 1e-7) -> Tensor:
    # Quintic Newton-Schulz towards the nearest semi-orthogonal matrix, in bf16.
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
    """Momentum, orthogonalised per matrix; every rank works on its share of the matrices and the updates are summed."""

    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        backend_steps: int,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                backend_steps=backend_steps,
                nesterov=nesterov,
                weight_decay=weight_decay,
            ),
        )

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
            lr = group["lr"]
            momentum = group["momentum"]
            backend_steps = group["backend_steps"]
            nesterov = group["nesterov"]
            weight_decay = group["weight_decay"]

            total_params = sum(int(p.numel()) for p in params)
            updates_flat = torch.zeros(total_params, device=params[0].device, dtype=torch.bfloat16)

            curr = 0
            for i, p in enumerate(params):
                if i % world_size == rank and p.grad is not None:
                    g = p.grad
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(g)
                    buf = state["momentum_buffer"]
                    buf.mul_(momentum).add_(g)
                    if nesterov:
                        g = g.add(buf, alpha=momentum)
                    g = zeropower_via_newtonschulz5(g, steps=backend_steps)
                    g *= max(1, g.size(0) / g.size(1)) ** 0.5
                    updates_flat[curr : curr + p.numel()] = g.reshape(-1)
                curr += p.numel()

            if distributed:
                dist.all_reduce(updates_flat, op=dist.ReduceOp.SUM)

            curr = 0
            for p in params:
                g = updates_flat[curr : curr + p.numel()].view_as(p).to(dtype=p.dtype)
                if weight_decay > 0:
                    p.mul_(1.0 - lr * weight_decay)
                p.add_(g, alpha=-lr)
                curr += p.numel()

        return loss


# -----------------------------
# TOKENIZER-AGNOSTIC SCORING
# -----------------------------
# The score is bits per byte, so every target token needs the number of UTF-8 bytes it stands for. A piece that
# begins with the space mark stands for one byte more, unless it follows a token that carries no text (BOS): the
# tokenizer then put the mark there by itself.


def build_sentencepiece_luts(
    sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
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


def target_bytes(prev_ids: Tensor, tgt_ids: Tensor, luts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Bytes of each target token, as float64, in the shape of tgt_ids."""
    base_bytes_lut, has_leading_space_lut, is_boundary_token_lut = luts
    token_bytes = base_bytes_lut[tgt_ids].to(dtype=torch.int16)
    token_bytes += (has_leading_space_lut[tgt_ids] & ~is_boundary_token_lut[prev_ids]).to(dtype=torch.int16)
    return token_bytes.to(torch.float64)


def load_validation_tokens(pattern: str) -> Tensor:
    files = [Path(p) for p in sorted(glob.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"No files found for pattern: {pattern}")
    # The fixed first 50,000 documents, every token of them: a last row shorter than the others is scored too.
    return torch.cat([load_data_shard(file) for file in files]).contiguous()


class ScoreTally:
    """Sums of nats, tokens and bytes on one rank; `finish` adds them over the ranks."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def add(self, nats: Tensor, token_bytes: Tensor) -> None:
        self.sums[0] += nats.to(torch.float64).sum()
        self.sums[1] += float(nats.numel())
        self.sums[2] += token_bytes.sum()

    def finish(self) -> tuple[float, float]:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
        nats, tokens, n_bytes = (float(v) for v in self.sums.tolist())
        val_loss = nats / tokens
        return val_loss, val_loss / math.log(2.0) * (tokens / n_bytes)


def eval_val(
    args: Hyperparameters,
    model: nn.Module,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Plain evaluation: disjoint rows of train_seq_len, each rank a contiguous share of them."""
    seq_len = args.train_seq_len
    total_targets = val_tokens.numel() - 1
    rows_per_batch = max(args.val_batch_size // (world_size * seq_len), 1)
    full_rows = total_targets // seq_len
    row_start = full_rows * rank // world_size
    row_end = full_rows * (rank + 1) // world_size
    spans = [(r, min(r + rows_per_batch, row_end)) for r in range(row_start, row_end, rows_per_batch)]
    pieces = [(a * seq_len, b * seq_len, seq_len) for a, b in spans]
    if rank == world_size - 1 and full_rows * seq_len < total_targets:
        pieces.append((full_rows * seq_len, total_targets, total_targets - full_rows * seq_len))

    tally = ScoreTally(device)
    model.eval()
    with torch.inference_mode():
        for raw_start, raw_end, width in pieces:
            local = val_tokens[raw_start : raw_end + 1].to(device=device, dtype=torch.int64, non_blocking=True)
            x = local[:-1].reshape(-1, width)
            y = local[1:].reshape(-1, width)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                batch_loss = model(x, y).detach()
            token_bytes = target_bytes(x, y, luts)
            tally.add(batch_loss.to(torch.float64).expand(y.numel()), token_bytes)
    model.train()
    return tally.finish()


# -----------------------------
# QUANTISATION
# -----------------------------
# Matrices of the blocks go to 6 bits with one fp16 scale per row, the tied embedding stays fp16 (it is input and
# output at once and does not take rounding well), vectors and gains stay fp32. The six bits lie in an int8 container:
# the compressor takes the two idle bits out again.

CONTROL_TENSOR_NAME_PATTERNS = tuple(
    pattern
    for pattern in os.environ.get(
        "CONTROL_TENSOR_NAME_PATTERNS",
        "attn_scale,mlp_scale,resid_mix,q_gain,skip_weight",
    ).split(",")
    if pattern
)
FP16_PASSTHROUGH_PATTERNS = tuple(
    pattern for pattern in os.environ.get("FP16_PASSTHROUGH_PATTERNS", "tok_emb,lm_head").split(",") if pattern
)
KEEP_FLOAT_MAX_NUMEL = 65_536
INT6_MAX = 31
CLIP_QUANTILES = (1.0, 0.9999, 0.9995, 0.999, 0.998, 0.996, 0.99)


def tensor_nbytes(t: Tensor) -> int:
    return int(t.numel()) * int(t.element_size())


def quantize_float_tensor(t: Tensor, input_power: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int6 codes and one scale per row.

    For every row several clips are tried and the one of least error is kept. The error of column j counts with
    input_power[j], the mean square of the activation that meets this column (GPTQ's diagonal, without the
    compensation of what follows).
    """
    t32 = t.float()
    if t32.ndim != 2:
        clip_abs = float(t32.abs().max().item()) if t32.numel() else 0.0
        scale = torch.tensor(clip_abs / INT6_MAX if clip_abs > 0 else 1.0, dtype=torch.float32)
        q = torch.clamp(torch.round(t32 / scale), -INT6_MAX, INT6_MAX).to(torch.int8).contiguous()
        return q, scale

    weight = input_power.float().to(t32.device)[None, :] if input_power is not None else torch.ones_like(t32[:1])
    best_err = torch.full((t32.shape[0],), float("inf"), device=t32.device)
    best_scale = torch.ones(t32.shape[0], device=t32.device)
    magnitudes = t32.abs()
    for quantile in CLIP_QUANTILES:
        clip = magnitudes.amax(dim=1) if quantile >= 1.0 else torch.quantile(magnitudes, quantile, dim=1)
        scale = (clip / INT6_MAX).clamp_min(1e-7).to(torch.float16).float().clamp_min(6e-8)
        codes = torch.clamp(torch.round(t32 / scale[:, None]), -INT6_MAX, INT6_MAX)
        err = ((t32 - codes * scale[:, None]).square() * weight).sum(dim=1)
        better = err < best_err
        best_err = torch.where(better, err, best_err)
        best_scale = torch.where(better, scale, best_scale)
    q = torch.clamp(torch.round(t32 / best_scale[:, None]), -INT6_MAX, INT6_MAX).to(torch.int8).contiguous()
    return q, best_scale.to(torch.float16).contiguous()


def quantize_state_dict_int6(state_dict: dict[str, Tensor], input_powers: dict[str, Tensor]):
    quantized: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    passthrough: dict[str, Tensor] = {}
    passthrough_orig_dtypes: dict[str, str] = {}
    stats = dict.fromkeys(("param_count", "num_tensors", "baseline_tensor_bytes", "payload_bytes"), 0)

    for name, tensor in state_dict.items():
        t = tensor.detach()
        stats["param_count"] += int(t.numel())
        stats["num_tensors"] += 1
        stats["baseline_tensor_bytes"] += tensor_nbytes(t)

        if not t.is_floating_point():
            passthrough[name] = t.cpu().contiguous()
        elif any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS):
            passthrough[name] = t.float().cpu().contiguous()
        elif any(pattern in name for pattern in FP16_PASSTHROUGH_PATTERNS) or t.numel() <= KEEP_FLOAT_MAX_NUMEL:
            passthrough_orig_dtypes[name] = str(t.dtype).removeprefix("torch.")
            passthrough[name] = t.to(torch.float16).cpu().contiguous()
        else:
            q, s = quantize_float_tensor(t, input_powers.get(name))
            quantized[name] = q.cpu()
            scales[name] = s.cpu()
            dtypes[name] = str(t.dtype).removeprefix("torch.")
            stats["payload_bytes"] += tensor_nbytes(q) + tensor_nbytes(s)
            continue
        stats["payload_bytes"] += tensor_nbytes(passthrough[name])

    obj: dict[str, object] = {
        "__quant_format__": "int6_per_row_v2",
        "quantized": quantized,
        "scales": scales,
        "dtypes": dtypes,
        "passthrough": passthrough,
        "passthrough_orig_dtypes": passthrough_orig_dtypes,
    }
    return obj, stats


def dequantize_state_dict_int6(obj: dict[str, object]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, q in obj["quantized"].items():
        dtype = getattr(torch, obj["dtypes"][name])
        s = obj["scales"][name].to(dtype=torch.float32)
        out[name] = (q.float() * (s[:, None] if s.ndim else s)).to(dtype=dtype).contiguous()
    for name, t in obj["passthrough"].items():
        restored = t.detach().to("cpu").contiguous()
        orig_dtype = obj["passthrough_orig_dtypes"].get(name)
        out[name] = restored.to(dtype=getattr(torch, orig_dtype)).contiguous() if orig_dtype else restored
    return out


def pack_blob(raw: bytes, level: int) -> bytes:
    """One tag byte, then zstd (or zlib at its best where zstandard is missing)."""
    if zstandard is not None:
        return b"Z" + zstandard.ZstdCompressor(level=level).compress(raw)
    return b"D" + zlib.compress(raw, 9)


def unpack_blob(blob: bytes) -> bytes:
    if blob[:1] == b"Z":
        return zstandard.ZstdDecompressor().decompress(blob[1:])
    return zlib.decompress(blob[1:])


class InputPowerMeter:
    """Mean square of every input channel of the big linear layers, gathered by forward hooks."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear) and module.weight.numel() > KEEP_FLOAT_MAX_NUMEL:
                self.handles.append(module.register_forward_pre_hook(self.hook_for(name + ".weight")))

    def hook_for(self, key: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].size(-1))
            power = x.square().sum(dim=0)
            self.sums[key] = self.sums[key] + power if key in self.sums else power
            self.rows[key] = self.rows.get(key, 0.0) + x.size(0)

        return hook

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        means: dict[str, Tensor] = {}
        for key in sorted(self.sums):
            packed = torch.cat([self.sums[key], torch.tensor([self.rows[key]], device=self.sums[key].device)])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(packed, op=dist.ReduceOp.SUM)
            means[key] = packed[:-1] / packed[-1]
        return means


def measure_input_powers(
    args: Hyperparameters,
    model: nn.Module,
    loader: DistributedTokenLoader,
    grad_accum_steps: int,
    seconds: float,
) -> dict[str, Tensor]:
    """Runs the next train batches through the averaged model, for at most so many seconds."""
    meter = InputPowerMeter(model)
    model.eval()
    began = time.perf_counter()
    with torch.inference_mode():
        for i in range(args.calib_steps):
            x, _ = loader.next_batch(args.calib_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                model.forward_logits(x)
            torch.cuda.synchronize()
            spent = torch.tensor(time.perf_counter() - began, device=x.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            if float(spent) > seconds:
                break
    model.train()
    return meter.close()


# -----------------------------
# DATA LOADING
# -----------------------------


def load_data_shard(file: Path) -> Tensor:
    header_bytes = 256 * np.dtype("<i4").itemsize
    token_bytes = np.dtype("<u2").itemsize
    header = np.fromfile(file, dtype="<i4", count=256)
    # SHARD HEADER INTS & SHARD_MAGIC
    if header.size != 256 or int(header[0]) != 20240520 or int(header[1]) != 1:
        raise ValueError(f"Unexpected shard header for {file}")
    num_tokens = int(header[2])
    expected_size = header_bytes + num_tokens * token_bytes
    if file.stat().st_size != expected_size:
        raise ValueError(f"Shard size mismatch for {file}: expected {expected_size} bytes")
    tokens_np = np.fromfile(file, dtype="<u2", count=num_tokens, offset=header_bytes)
    if tokens_np.size != num_tokens:
        raise ValueError(f"Short read for {file}")
    return torch.from_numpy(tokens_np.astype(np.uint16, copy=False))


class TokenStream:
    # Reads shards one after another and wraps around for ever; no sampling, no workers.
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
    # Every rank reads the same stream and keeps its own slice; one token more per slice gives the (x, y) shift.
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
# TRANSFORMER MODULES
# -----------------------------


class RMSNorm(nn.Module):
    def __init__(self, eps: float | None = None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.eps)


class CastedLinear(nn.Linear):
    # fp32 weights for the optimiser, cast to the activation's type for the product.
    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


def restore_low_dim_params_to_fp32(module: nn.Module) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            is_control = any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
            if (param.ndim < 2 or is_control) and param.dtype != torch.float32:
                param.data = param.data.float()


class Rotary(nn.Module):
    # Keeps the tables of the last length seen.
    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def forward(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._cos_cached is None or self._seq_len_cached != seq_len or self._cos_cached.device != device:
            t = torch.arange(seq_len, device=device, dtype=self.inv_freq.dtype)
            freqs = torch.outer(t, self.inv_freq.to(device))
            self._cos_cached = freqs.cos()[None, None, :, :].clone()
            self._sin_cached = freqs.sin()[None, None, :, :].clone()
            self._seq_len_cached = seq_len
        return self._cos_cached.to(dtype=dtype), self._sin_cached.to(dtype=dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, rope_base: float, qk_gain_init: float):
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError("model_dim must be divisible by num_heads")
        if num_heads % num_kv_heads != 0:
            raise ValueError("num_heads must be divisible by num_kv_heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        if self.head_dim % 2 != 0:
            raise ValueError("head_dim must be even for RoPE")
        kv_dim = self.num_kv_heads * self.head_dim
        self.c_q = CastedLinear(dim, dim, bias=False)
        self.c_k = CastedLinear(dim, kv_dim, bias=False)
        self.c_v = CastedLinear(dim, kv_dim, bias=False)
        self.proj = CastedLinear(dim, dim, bias=False)
        self.proj._zero_init = True
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain_init, dtype=torch.float32))
        self.rotary = Rotary(self.head_dim, base=rope_base)

    def forward(self, x: Tensor, q_delta: Tensor | None = None, v_delta: Tensor | None = None) -> Tensor:
        bsz, seqlen, dim = x.shape
        q = self.c_q(x)
        k = self.c_k(x)
        v = self.c_v(x)
        if q_delta is not None:
            q = q + q_delta
        if v_delta is not None:
            v = v + v_delta
        q = q.reshape(bsz, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = v.reshape(bsz, seqlen, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = F.rms_norm(q, (q.size(-1),))
        k = F.rms_norm(k, (k.size(-1),))
        cos, sin = self.rotary(seqlen, x.device, q.dtype)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        q = q * self.q_gain.to(dtype=q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None,
            is_causal=True,
            enable_gqa=(self.num_kv_heads != self.num_heads),
        )
        y = y.transpose(1, 2).contiguous().reshape(bsz, seqlen, dim)
        return self.proj(y)


class MLP(nn.Module):
    # relu^2, three times as wide as the stream: what int6 saves is spent here.
    def __init__(self, dim: int, mlp_mult: int):
        super().__init__()
        hidden = mlp_mult * dim
        self.fc = CastedLinear(dim, hidden, bias=False)
        self.proj = CastedLinear(hidden, dim, bias=False)
        self.proj._zero_init = True

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, mlp_mult: int, rope_base: float, qk_gain_init: float
    ):
        super().__init__()
        self.attn_norm = RMSNorm()
        self.mlp_norm = RMSNorm()
        self.attn = CausalSelfAttention(dim, num_heads, num_kv_heads, rope_base, qk_gain_init)
        self.mlp = MLP(dim, mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.mlp_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))).float())

    def forward(self, x: Tensor, x0: Tensor, q_delta_fn=None, v_delta_fn=None) -> Tensor:
        mix = self.resid_mix.to(dtype=x.dtype)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        n = self.attn_norm(x)
        q_delta = q_delta_fn(n) if q_delta_fn is not None else None
        v_delta = v_delta_fn(n) if v_delta_fn is not None else None
        x = x + self.attn_scale.to(dtype=x.dtype)[None, None, :] * self.attn(n, q_delta, v_delta)
        return x + self.mlp_scale.to(dtype=x.dtype)[None, None, :] * self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        model_dim: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_mult: int,
        tie_embeddings: bool,
        tied_embed_init_std: float,
        logit_softcap: float,
        rope_base: float,
        qk_gain_init: float,
    ):
        super().__init__()
        if logit_softcap <= 0.0:
            raise ValueError(f"logit_softcap must be positive, got {logit_softcap}")
        self.tie_embeddings = tie_embeddings
        self.tied_embed_init_std = tied_embed_init_std
        self.logit_softcap = logit_softcap
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        self.num_encoder_layers = num_layers // 2
        self.num_decoder_layers = num_layers - self.num_encoder_layers
        self.num_skip_weights = min(self.num_encoder_layers, self.num_decoder_layers)
        self.skip_weights = nn.Parameter(torch.ones(self.num_skip_weights, model_dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(
            [
                Block(model_dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init)
                for _ in range(num_layers)
            ]
        )
        self.final_norm = RMSNorm()
        self.lm_head = None if tie_embeddings else CastedLinear(model_dim, vocab_size, bias=False)
        if self.lm_head is not None:
            self.lm_head._zero_init = True
        self._init_weights()

    def _init_weights(self) -> None:
        if self.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, mean=0.0, std=self.tied_embed_init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if getattr(module, "_zero_init", False):
                    nn.init.zeros_(module.weight)
                elif module.weight.size(0) >= 64:
                    nn.init.orthogonal_(module.weight)

    def hidden(self, input_ids: Tensor, lora: DocumentLoRA | None = None) -> Tensor:
        x = self.tok_emb(input_ids)
        x = F.rms_norm(x, (x.size(-1),))
        x0 = x
        skips: list[Tensor] = []
        # The first half of the blocks stores skips, the second takes them back in reverse order.
        for i in range(self.num_encoder_layers):
            qd, vd = lora.deltas(i) if lora is not None else (None, None)
            x = self.blocks[i](x, x0, qd, vd)
            skips.append(x)
        for i in range(self.num_decoder_layers):
            layer = self.num_encoder_layers + i
            if skips:
                x = x + self.skip_weights[i].to(dtype=x.dtype)[None, None, :] * skips.pop()
            qd, vd = lora.deltas(layer) if lora is not None else (None, None)
            x = self.blocks[layer](x, x0, qd, vd)
        return self.final_norm(x)

    def head(self, h: Tensor, lora: DocumentLoRA | None = None) -> Tensor:
        if self.tie_embeddings:
            logits_proj = F.linear(h, self.tok_emb.weight.to(h.dtype))
        else:
            logits_proj = self.lm_head(h)
        if lora is not None:
            logits_proj = logits_proj + lora.head(h)
        return self.logit_softcap * torch.tanh(logits_proj / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor, lora: DocumentLoRA | None = None) -> Tensor:
        return self.head(self.hidden(input_ids, lora), lora)

    def forward(self, input_ids: Tensor, target_ids: Tensor, lora: DocumentLoRA | None = None) -> Tensor:
        """The mean loss; with an adapter the loss of every token, in the shape of target_ids."""
        logits = self.forward_logits(input_ids, lora)
        flat = logits.float().reshape(-1, logits.size(-1))
        if lora is None:
            return F.cross_entropy(flat, target_ids.reshape(-1), reduction="mean")
        return F.cross_entropy(flat, target_ids.reshape(-1), reduction="none").reshape(target_ids.shape)


# -----------------------------
# SLIDING WINDOW EVALUATION
# -----------------------------


def sliding_spans(total_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, fresh, end): a window reads targets start..end and scores fresh..end; the fresh parts tile 0..total."""
    first_end = min(seq_len, total_targets)
    spans = [(0, 0, first_end)]
    fresh = first_end
    while fresh < total_targets:
        end = min(fresh + stride, total_targets)
        spans.append((end - seq_len, fresh, end))
        fresh = end
    return spans


def eval_val_sliding(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Every token is scored once, with at least seq_len - stride tokens of context (but for the first window)."""
    seq_len = min(args.eval_seq_len, val_tokens.numel() - 1)
    spans = sliding_spans(val_tokens.numel() - 1, seq_len, args.eval_stride)
    mine = spans[len(spans) * rank // world_size : len(spans) * (rank + 1) // world_size]
    logits_fn = torch.compile(base_model.forward_logits, dynamic=False, fullgraph=True)

    tally = ScoreTally(device)
    base_model.eval()
    with torch.inference_mode():
        for b in range(0, len(mine), args.eval_batch_seqs):
            batch = mine[b : b + args.eval_batch_seqs]
            # The last batch is filled up with copies of its first window, so that one graph serves all.
            padded = batch + batch[:1] * (args.eval_batch_seqs - len(batch))
            rows = torch.stack([val_tokens[s : s + seq_len + 1] for s, _, _ in padded])
            rows = rows.to(device=device, dtype=torch.int64, non_blocking=True)
            x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                logits = logits_fn(x)
            nll = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
            n_bytes = target_bytes(x, y, luts)
            for i, (start, fresh, end) in enumerate(batch):
                tally.add(nll[i, fresh - start : end - start], n_bytes[i, fresh - start : end - start])
    base_model.train()
    return tally.finish()


# -----------------------------
# PER-DOCUMENT LORA AT EVALUATION
# -----------------------------


class BatchedLinearLoRA(nn.Module):
    """One low-rank update per row of the batch: delta(x)[b] = x[b] @ A[b]^T @ B[b]^T, zero at first."""

    def __init__(self, bsz: int, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(bsz, rank, in_features))
        self.B = nn.Parameter(torch.zeros(bsz, out_features, rank))
        bound = 1.0 / math.sqrt(in_features)
        with torch.no_grad():
            self.A.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        down = torch.bmm(x, self.A.to(x.dtype).transpose(1, 2))
        return torch.bmm(down, self.B.to(x.dtype).transpose(1, 2))


class DocumentLoRA(nn.Module):
    """Adapters on q and v of every block and on the head, separately for every document of a batch."""

    def __init__(self, bsz: int, model: GPT, rank: int):
        super().__init__()
        dim = model.tok_emb.embedding_dim
        vocab = model.tok_emb.num_embeddings
        self.head = BatchedLinearLoRA(bsz, dim, vocab, rank)
        self.q = nn.ModuleList()
        self.v = nn.ModuleList()
        for block in model.blocks:
            self.q.append(BatchedLinearLoRA(bsz, dim, block.attn.c_q.weight.shape[0], rank))
            self.v.append(BatchedLinearLoRA(bsz, dim, block.attn.c_v.weight.shape[0], rank))

    def deltas(self, layer: int) -> tuple[nn.Module, nn.Module]:
        return self.q[layer], self.v[layer]


def find_documents(tokens: Tensor, bos_id: int) -> list[tuple[int, int]]:
    """(start, number of targets) of each document. The BOS after a document counts as its last target."""
    starts = (tokens == bos_id).nonzero(as_tuple=True)[0].tolist()
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    ends = starts[1:] + [tokens.numel() - 1]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end > start]


def chunk_window(chunk_idx: int, num_targets: int, chunk_size: int, seq_len: int) -> tuple[int, int, int]:
    """(window start, chunk start, chunk end), in targets of the document."""
    lo = chunk_idx * chunk_size
    hi = min(lo + chunk_size, num_targets)
    return max(0, hi - seq_len), lo, hi


def gather_chunk(
    docs: list[tuple[int, int]],
    chunk_idx: int,
    args: Hyperparameters,
    val_tokens: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, the mask of the chunk's own targets, and the mask of the rows that still have a chunk to come."""
    windows: list[tuple[int, int, int, int]] = []
    for row, (_, n) in enumerate(docs):
        if chunk_idx * args.ttt_chunk_size < n:
            windows.append((row, *chunk_window(chunk_idx, n, args.ttt_chunk_size, args.ttt_eval_seq_len)))
    width = max(hi - ws for _, ws, _, hi in windows)
    x = torch.zeros(len(docs), width, dtype=torch.int64)
    y = torch.zeros(len(docs), width, dtype=torch.int64)
    own = torch.zeros(len(docs), width, dtype=torch.bool)
    more = torch.zeros(len(docs), dtype=torch.bool)
    for row, ws, lo, hi in windows:
        start, n = docs[row]
        piece = val_tokens[start + ws : start + hi + 1].to(torch.int64)
        x[row, : hi - ws] = piece[:-1]
        y[row, : hi - ws] = piece[1:]
        own[row, lo - ws : hi - ws] = True
        more[row] = hi < n
    return x.to(device), y.to(device), own.to(device), more.to(device)


def eval_val_ttt_lora(
    args: Hyperparameters,
    base_model: GPT,
    rank: int,
    world_size: int,
    device: torch.device,
    val_tokens: Tensor,
    luts: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, float]:
    """Score first, then learn: a chunk is graded by adapters that saw only earlier chunks of the same document.

    The adapters of a batch start at zero and are thrown away after it, so nothing passes between documents and the
    order of the documents does not matter. They are sorted by length only to keep the padding small.
    """
    docs = find_documents(val_tokens, args.bos_id)
    mine = sorted(docs[rank::world_size], key=lambda doc: doc[1])
    for p in base_model.parameters():
        p.requires_grad_(False)
    base_model.eval()

    tally = ScoreTally(device)
    for b in range(0, len(mine), args.ttt_batch_size):
        batch = mine[b : b + args.ttt_batch_size]
        lora = DocumentLoRA(len(batch), base_model, args.ttt_lora_rank).to(device)
        optimizer = torch.optim.Adam(
            lora.parameters(), lr=args.ttt_lora_lr, betas=(args.ttt_beta1, args.ttt_beta2), eps=1e-10
        )
        num_chunks = max((n + args.ttt_chunk_size - 1) // args.ttt_chunk_size for _, n in batch)
        for chunk_idx in range(num_chunks):
            x, y, own, more = gather_chunk(batch, chunk_idx, args, val_tokens, device)
            learn = bool(more.any())
            with torch.set_grad_enabled(learn):
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                    losses = base_model(x, y, lora=lora)
            # Grade.
            tally.add(losses.detach()[own], target_bytes(x, y, luts)[own])
            # Learn from what has just been graded.
            if learn:
                train_mask = (own & more[:, None]).to(losses.dtype)
                per_doc = (losses * train_mask).sum(dim=1) / train_mask.sum(dim=1).clamp_min(1.0)
                optimizer.zero_grad(set_to_none=True)
                per_doc.sum().backward()
                optimizer.step()
    return tally.finish()


# -----------------------------
# WEIGHT AVERAGING
# -----------------------------


class WeightAverage:
    """Uniform mean of the weights at the moments at which `add` was called."""

    def __init__(self):
        self.total: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            if name in self.total:
                self.total[name] += t.float()
            else:
                self.total[name] = t.detach().float().clone()
        self.count += 1

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        own = model.state_dict()
        mean = {name: (t / self.count).to(own[name].dtype) for name, t in self.total.items()}
        model.load_state_dict(mean, strict=True)


# -----------------------------
# TRAINING
# -----------------------------


def main() -> None:
    global zeropower_via_newtonschulz5

    code = Path(__file__).read_text(encoding="utf-8")
    args = Hyperparameters()
    zeropower_via_newtonschulz5 = torch.compile(zeropower_via_newtonschulz5)

    # -----------------------------
    # DISTRIBUTED + CUDA SETUP
    # -----------------------------

    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size <= 0 or 8 % world_size != 0:
        raise ValueError(f"WORLD_SIZE={world_size} must divide 8, so that the number of micro-steps is whole")
    grad_accum_steps = 8 // world_size
    grad_scale = 1.0 / grad_accum_steps
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group(backend="nccl", device_id=device)
        dist.barrier()
    master_process = rank == 0

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)

    logfile = None
    if master_process:
        os.makedirs("logs", exist_ok=True)
        logfile = f"logs/{args.run_id}.txt"
        print(logfile)

    def log0(msg: str, console: bool = True) -> None:
        if not master_process:
            return
        if console:
            print(msg)
        if logfile is not None:
            with open(logfile, "a", encoding="utf-8") as f:
                print(msg, file=f)

    log0(code, console=False)
    log0("=" * 100, console=False)
    log0(f"Running Python {sys.version}", console=False)
    log0(f"Running PyTorch {torch.__version__}", console=False)
    log0(
        subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False).stdout,
        console=False,
    )
    log0("=" * 100, console=False)

    # -----------------------------
    # TOKENIZER + VALIDATION METRIC SETUP
    # -----------------------------

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed_all(args.seed)

    if not args.tokenizer_path.endswith(".model"):
        raise ValueError(f"Script only setup for SentencePiece .model file: {args.tokenizer_path}")
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if int(sp.vocab_size()) != args.vocab_size:
        raise ValueError(f"VOCAB_SIZE={args.vocab_size} does not match tokenizer vocab_size={int(sp.vocab_size())}")
    val_tokens = load_validation_tokens(args.val_files)
    luts = build_sentencepiece_luts(sp, args.vocab_size, device)
    num_train_shards = len(glob.glob(args.train_files))
    log0(f"train_loader:shards:{num_train_shards} pattern={args.train_files}")
    log0(f"val_loader:pattern={args.val_files} tokens:{val_tokens.numel() - 1}")

    # -----------------------------
    # MODEL + OPTIMIZER SETUP
    # -----------------------------

    base_model = (
        GPT(
            vocab_size=args.vocab_size,
            num_layers=args.num_layers,
            model_dim=args.model_dim,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            mlp_mult=args.mlp_mult,
            tie_embeddings=args.tie_embeddings,
            tied_embed_init_std=args.tied_embed_init_std,
            logit_softcap=args.logit_softcap,
            rope_base=args.rope_base,
            qk_gain_init=args.qk_gain_init,
        )
        .to(device)
        .bfloat16()
    )
    for module in base_model.modules():
        if isinstance(module, CastedLinear):
            module.float()
    restore_low_dim_params_to_fp32(base_model)
    compiled_model = torch.compile(base_model, dynamic=False, fullgraph=True)
    model: nn.Module = (
        DDP(compiled_model, device_ids=[local_rank], broadcast_buffers=False) if distributed else compiled_model
    )

    # Matrices of the blocks go to Muon; everything else (embedding, gains, scales) to Adam.
    block_named_params = list(base_model.blocks.named_parameters())
    matrix_params = [
        p
        for name, p in block_named_params
        if p.ndim == 2 and not any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    scalar_params = [
        p
        for name, p in block_named_params
        if p.ndim < 2 or any(pattern in name for pattern in CONTROL_TENSOR_NAME_PATTERNS)
    ]
    if base_model.skip_weights.numel() > 0:
        scalar_params.append(base_model.skip_weights)
    token_lr = args.tied_embed_lr if args.tie_embeddings else args.embed_lr
    optimizer_tok = torch.optim.Adam(
        [{"params": [base_model.tok_emb.weight], "lr": token_lr, "base_lr": token_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        fused=True,
    )
    optimizer_muon = Muon(
        matrix_params,
        lr=args.matrix_lr,
        momentum=args.muon_momentum,
        backend_steps=args.muon_backend_steps,
        weight_decay=args.muon_weight_decay,
    )
    for group in optimizer_muon.param_groups:
        group["base_lr"] = args.matrix_lr
    optimizer_scalar = torch.optim.Adam(
        [{"params": scalar_params, "lr": args.scalar_lr, "base_lr": args.scalar_lr}],
        betas=(args.beta1, args.beta2),
        eps=args.adam_eps,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [optimizer_tok, optimizer_muon, optimizer_scalar]
    if base_model.lm_head is not None:
        optimizer_head = torch.optim.Adam(
            [{"params": [base_model.lm_head.weight], "lr": args.head_lr, "base_lr": args.head_lr}],
            betas=(args.beta1, args.beta2),
            eps=args.adam_eps,
            fused=True,
        )
        optimizers.insert(1, optimizer_head)

    n_params = sum(p.numel() for p in base_model.parameters())
    log0(f"model_params:{n_params}")
    log0(f"world_size:{world_size} grad_accum_steps:{grad_accum_steps} seed:{args.seed}")
    log0(
        f"train_batch_tokens:{args.train_batch_tokens} train_seq_len:{args.train_seq_len} "
        f"iterations:{args.iterations} warmup_steps:{args.warmup_steps} "
        f"max_wallclock_seconds:{args.max_wallclock_seconds:.3f} reserve:{args.quant_reserve_seconds:.1f}"
    )

    # -----------------------------
    # DATA LOADER & MODEL WARMUP
    # -----------------------------

    train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    def zero_grad_all() -> None:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)

    max_wallclock_ms = 1000.0 * args.max_wallclock_seconds if args.max_wallclock_seconds > 0 else None
    train_budget_ms = max_wallclock_ms - 1000.0 * args.quant_reserve_seconds if max_wallclock_ms else None

    def lr_mul(step: int, elapsed_ms: float) -> float:
        if args.warmdown_iters <= 0:
            return 1.0
        if train_budget_ms is None:
            warmdown_start = max(args.iterations - args.warmdown_iters, 0)
            if step < warmdown_start:
                return 1.0
            return max((args.iterations - step) / max(args.warmdown_iters, 1), 0.0)
        step_ms = elapsed_ms / max(step, 1)
        warmdown_ms = args.warmdown_iters * step_ms
        remaining_ms = max(train_budget_ms - elapsed_ms, 0.0)
        return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0

    def forward_backward() -> Tensor:
        zero_grad_all()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if distributed:
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            x, y = train_loader.next_batch(args.train_batch_tokens, args.train_seq_len, grad_accum_steps)
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
                loss = model(x, y)
            train_loss += loss.detach()
            (loss * grad_scale).backward()
        return train_loss / grad_accum_steps

    # The warm-up compiles every path and fills the optimisers' state; then weights and optimisers are put back and
    # the train stream starts again at its first token.
    if args.warmup_steps > 0:
        initial_model_state = {name: t.detach().cpu().clone() for name, t in base_model.state_dict().items()}
        initial_optimizer_states = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
        model.train()
        for warmup_step in range(args.warmup_steps):
            forward_backward()
            for opt in optimizers:
                opt.step()
            if args.warmup_steps <= 20 or (warmup_step + 1) % 10 == 0:
                log0(f"warmup_step:{warmup_step + 1}/{args.warmup_steps}")
        base_model.load_state_dict(initial_model_state, strict=True)
        for opt, state in zip(optimizers, initial_optimizer_states, strict=True):
            opt.load_state_dict(state)
        zero_grad_all()
        train_loader = DistributedTokenLoader(args.train_files, rank, world_size, device)

    # -----------------------------
    # MAIN TRAINING LOOP
    # -----------------------------

    swa = WeightAverage()
    training_time_ms = 0.0
    stop_after_step: int | None = None
    torch.cuda.synchronize()
    t0 = time.perf_counter()

    step = 0
    while True:
        last_step = step == args.iterations or (stop_after_step is not None and step >= stop_after_step)
        should_validate = last_step or (args.val_loss_every > 0 and step % args.val_loss_every == 0)
        if should_validate:
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
            if stop_after_step is not None and step < args.iterations:
                log0(f"stopping_early: wallclock_cap train_time:{training_time_ms:.0f}ms step:{step}/{args.iterations}")
            break

        elapsed_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        scale = lr_mul(step, elapsed_ms)
        train_loss = forward_backward()

        frac = min(step / args.muon_momentum_warmup_steps, 1.0) if args.muon_momentum_warmup_steps > 0 else 1.0
        muon_momentum = (1 - frac) * args.muon_momentum_warmup_start + frac * args.muon_momentum
        for group in optimizer_muon.param_groups:
            group["momentum"] = muon_momentum
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        if args.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(base_model.parameters(), args.grad_clip_norm)
        for opt in optimizers:
            opt.step()
        zero_grad_all()

        step += 1
        if args.swa_enabled and scale < args.swa_start_scale and step % args.swa_every == 0:
            swa.add(base_model)

        approx_training_time_ms = training_time_ms + 1000.0 * (time.perf_counter() - t0)
        if args.train_log_every > 0 and (step <= 10 or step % args.train_log_every == 0):
            log0(
                f"step:{step}/{args.iterations} train_loss:{train_loss.item():.4f} "
                f"train_time:{approx_training_time_ms:.0f}ms step_avg:{approx_training_time_ms / step:.2f}ms"
            )

        # All ranks must stop after the same step.
        reached_cap = train_budget_ms is not None and approx_training_time_ms >= train_budget_ms
        if distributed and train_budget_ms is not None:
            reached_cap_tensor = torch.tensor(int(reached_cap), device=device)
            dist.all_reduce(reached_cap_tensor, op=dist.ReduceOp.MAX)
            reached_cap = bool(reached_cap_tensor.item())
        if stop_after_step is None and reached_cap:
            stop_after_step = step

    log0(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() // 1024 // 1024} MiB"
    )

    # -----------------------------
    # SWA + CALIBRATION + SERIALIZATION
    # -----------------------------
    # All of it within the seconds that the training loop left over.

    torch.cuda.synchronize()
    t_pack = time.perf_counter()
    if swa.count > 0:
        swa.load_into(base_model)
        log0(f"swa: mean of {swa.count} snapshots")
    input_powers = measure_input_powers(
        args, base_model, train_loader, grad_accum_steps, seconds=args.quant_reserve_seconds / 3
    )
    quant_obj, quant_stats = quantize_state_dict_int6(base_model.state_dict(), input_powers)
    quant_buf = io.BytesIO()
    torch.save(quant_obj, quant_buf)
    quant_raw = quant_buf.getvalue()
    if master_process:
        Path("final_model.int6.ptz").write_bytes(pack_blob(quant_raw, args.zstd_level))
    torch.cuda.synchronize()
    pack_ms = 1000.0 * (time.perf_counter() - t_pack)
    log0(f"calibration+packing:{pack_ms:.0f}ms train+packing:{training_time_ms + pack_ms:.0f}ms")
    if distributed:
        dist.barrier()

    quant_file_bytes = os.path.getsize("final_model.int6.ptz")
    code_bytes = len(code.encode("utf-8"))
    total_bytes = quant_file_bytes + code_bytes
    ratio = quant_stats["baseline_tensor_bytes"] / max(quant_stats["payload_bytes"], 1)
    log0(f"Serialized model int6: {quant_file_bytes} bytes (raw_torch:{len(quant_raw)} payload_ratio:{ratio:.2f}x)")
    log0(f"Code size: {code_bytes} bytes")
    log0(f"Total submission size: {total_bytes} bytes")
    if total_bytes > args.size_limit_bytes:
        raise RuntimeError(f"submission of {total_bytes} bytes is over {args.size_limit_bytes}")

    # -----------------------------
    # ROUNDTRIP VALIDATION
    # -----------------------------

    blob = Path("final_model.int6.ptz").read_bytes()
    quant_state = torch.load(io.BytesIO(unpack_blob(blob)), map_location="cpu", weights_only=True)
    base_model.load_state_dict(dequantize_state_dict_int6(quant_state), strict=True)

    torch.cuda.synchronize()
    t_eval = time.perf_counter()
    q_loss, q_bpb = eval_val(args, compiled_model, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_roundtrip val_loss:{q_loss:.4f} val_bpb:{q_bpb:.4f} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms"
    )

    torch.cuda.synchronize()
    t_slide = time.perf_counter()
    s_loss, s_bpb = eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, luts)
    torch.cuda.synchronize()
    log0(
        f"final_int6_sliding_window val_loss:{s_loss:.4f} val_bpb:{s_bpb:.4f} stride:{args.eval_stride} "
        f"eval_time:{1000.0 * (time.perf_counter() - t_slide):.0f}ms"
    )
    final_loss, final_bpb = s_loss, s_bpb

    if args.ttt_enabled:
        torch._dynamo.reset()
        torch.cuda.synchronize()
        t_ttt = time.perf_counter()
        final_loss, final_bpb = eval_val_ttt_lora(args, base_model, rank, world_size, device, val_tokens, luts)
        torch.cuda.synchronize()
        log0(
            f"final_int6_ttt_lora val_loss:{final_loss:.4f} val_bpb:{final_bpb:.4f} "
            f"eval_time:{1000.0 * (time.perf_counter() - t_ttt):.0f}ms"
        )
    log0(f"total_eval_time:{1000.0 * (time.perf_counter() - t_eval):.0f}ms")
    log0(f"final_exact val_loss:{final_loss:.8f} val_bpb:{final_bpb:.8f}")

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
