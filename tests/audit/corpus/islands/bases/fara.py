"""
CaseOps + phased LoRA TTT + gated attention + int6/int7 GPTQ with LQER.

    python train_gpt.py prepare --docs docs.jsonl --out data/datasets/fineweb10B_sp8192_caseops
    torchrun --standalone --nproc_per_node=8 train_gpt.py

The text is made case-normalised (lossless, see encode_case) before SentencePiece sees it. Because the
transformed text has other bytes than the original, the validation shards come with a sidecar
`fineweb_val_bytes_*.bin`: one number per token, the UTF-8 bytes of ORIGINAL text which that token stands for.
"""

from __future__ import annotations

import argparse
import copy
import glob
import io
import json
import math
import os
import random
import re
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

# ----------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------


def env_int(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def env_float(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def env_bool(name: str, default: bool) -> bool:
    return bool(int(os.environ.get(name, "1" if default else "0")))


def env_list(name: str, default: str, cast=int) -> list:
    return [cast(part) for part in os.environ.get(name, default).split(",") if part.strip()]


class Hyperparameters:
    # data
    data_dir = os.environ.get("DATA_DIR", "./data")
    caseops = env_bool("CASEOPS", True)
    dataset = os.environ.get("DATASET", "fineweb10B_sp8192_caseops" if caseops else "fineweb10B_sp8192")
    data_path = os.path.join(data_dir, "datasets", dataset)
    # the [0-9] matters: fineweb_val_*.bin would also match the byte sidecar
    train_files = os.path.join(data_path, "fineweb_train_[0-9]*.bin")
    val_files = os.path.join(data_path, "fineweb_val_[0-9]*.bin")
    val_byte_files = os.path.join(data_path, "fineweb_val_bytes_[0-9]*.bin")
    tokenizer_path = os.environ.get(
        "TOKENIZER_PATH",
        os.path.join(data_dir, "tokenizers", "fineweb_8192_caseops.model" if caseops else "fineweb_8192_bpe.model"),
    )
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = env_int("SEED", 1337)

    # model
    vocab_size = env_int("VOCAB_SIZE", 8192)
    num_layers = env_int("NUM_LAYERS", 11)
    model_dim = env_int("MODEL_DIM", 512)
    num_heads = env_int("NUM_HEADS", 8)
    num_kv_heads = env_int("NUM_KV_HEADS", 4)
    mlp_mult = env_float("MLP_MULT", 4.0)
    rope_dims = env_int("ROPE_DIMS", 16)
    rope_base = env_float("ROPE_BASE", 10000.0)
    logit_softcap = env_float("LOGIT_SOFTCAP", 30.0)
    qk_gain_init = env_float("QK_GAIN_INIT", 5.0)
    gate_dims = env_int("GATE_DIMS", 12)
    attn_gate = env_bool("ATTN_GATE", True)
    smear = env_bool("SMEAR", True)
    loop_start = env_int("LOOP_START", 3)
    loop_end = env_int("LOOP_END", 5)
    num_loops = env_int("NUM_LOOPS", 2)
    loop_at = env_float("LOOP_AT", 0.35)
    tied_init_std = env_float("TIED_INIT_STD", 0.005)

    # training
    iterations = env_int("ITERATIONS", 20000)
    warmup_steps = env_int("WARMUP_STEPS", 20)
    train_seq_len = env_int("TRAIN_SEQ_LEN", 2048)
    train_batch_tokens = env_int("TRAIN_BATCH_TOKENS", 786432)
    max_wallclock_seconds = env_float("MAX_WALLCLOCK_SECONDS", 600.0)
    gptq_reserve_seconds = env_float("GPTQ_RESERVE_SECONDS", 48.0)
    warmdown_frac = env_float("WARMDOWN_FRAC", 0.72)
    min_lr = env_float("MIN_LR", 0.05)
    train_log_every = env_int("TRAIN_LOG_EVERY", 500)
    val_loss_every = env_int("VAL_LOSS_EVERY", 4000)

    # optimiser
    matrix_lr = env_float("MATRIX_LR", 0.022)
    scalar_lr = env_float("SCALAR_LR", 0.02)
    embed_lr = env_float("EMBED_LR", 0.03)
    muon_momentum = env_float("MUON_MOMENTUM", 0.97)
    muon_momentum_start = env_float("MUON_MOMENTUM_START", 0.92)
    muon_momentum_steps = env_int("MUON_MOMENTUM_STEPS", 1500)
    muon_backend_steps = env_int("MUON_BACKEND_STEPS", 5)
    muon_wd = env_float("MUON_WD", 0.095)
    adam_wd = env_float("ADAM_WD", 0.02)
    embed_wd = env_float("EMBED_WD", 0.085)
    beta1 = env_float("BETA1", 0.9)
    beta2 = env_float("BETA2", 0.95)
    adam_eps = env_float("ADAM_EPS", 1e-8)
    grad_clip = env_float("GRAD_CLIP", 0.3)
    ema_decay = env_float("EMA_DECAY", 0.9965)

    # quantisation
    matrix_bits = env_int("MATRIX_BITS", 6)
    embed_bits = env_int("EMBED_BITS", 7)
    matrix_clip = env_float("MATRIX_CLIP", 12.85)
    embed_clip = env_float("EMBED_CLIP", 15.0)
    gptq_batches = env_int("GPTQ_BATCHES", 16)
    gptq_batch_rows = env_int("GPTQ_BATCH_ROWS", 16)
    gptq_block = env_int("GPTQ_BLOCK", 128)
    gptq_damp = env_float("GPTQ_DAMP", 0.01)
    lqer_rank = env_int("LQER_RANK", 4)
    lqer_top = env_int("LQER_TOP", 3)
    temp_batches = env_int("TEMP_BATCHES", 4)
    temp_grid = env_list("TEMP_GRID", "0.96,0.98,1.0,1.02,1.04", float)
    artifact = os.environ.get("ARTIFACT", "final_model.int6.ptz")
    size_limit = 16_000_000

    # evaluation
    eval_mode = os.environ.get("EVAL_MODE", "ttt")  # ttt | sliding
    eval_seq_len = env_int("EVAL_SEQ_LEN", 2048)
    eval_stride = env_int("EVAL_STRIDE", 64)
    eval_rows = env_int("EVAL_ROWS", 32)
    eval_budget_s = env_float("EVAL_BUDGET_S", 560.0)
    ttt_chunk = env_int("TTT_CHUNK", 64)
    ttt_docs = env_int("TTT_DOCS", 64)
    ttt_batch_tokens = env_int("TTT_BATCH_TOKENS", 196608)
    ttt_rank = env_int("TTT_RANK", 48)
    ttt_lr = env_float("TTT_LR", 1e-4)
    ttt_wd = env_float("TTT_WD", 0.5)
    ttt_beta2 = env_float("TTT_BETA2", 0.99)
    phase_bounds = env_list("PHASE_BOUNDS", "1000,2500,5000")
    phase_lr = env_float("PHASE_LR", 1e-3)
    phase_momentum = env_float("PHASE_MOMENTUM", 0.9)
    phase_rows = env_int("PHASE_ROWS", 8)
    phase_clip = env_float("PHASE_CLIP", 1.0)
    tilt = env_bool("TILT", True)
    tilt_orders = env_list("TILT_ORDERS", "8,5,3")
    tilt_betas = env_list("TILT_BETAS", "2.4,1.5,0.7", float)
    tilt_min_votes = env_int("TILT_MIN_VOTES", 1)


BOS_ID = 1
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256


class Run:
    """Who we are: rank, device and log file."""

    def __init__(self, args: Hyperparameters):
        self.distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.rank = env_int("RANK", 0)
        self.world = env_int("WORLD_SIZE", 1)
        self.local_rank = env_int("LOCAL_RANK", 0)
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA is required")
        if 8 % self.world:
            raise ValueError(f"WORLD_SIZE={self.world} must divide 8")
        self.accum = 8 // self.world
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        if self.distributed:
            dist.init_process_group(backend="nccl", device_id=self.device)
            dist.barrier()
        self.master = self.rank == 0
        self.logfile = None
        if self.master:
            os.makedirs("logs", exist_ok=True)
            self.logfile = f"logs/{args.run_id}.txt"

    def log(self, message: str, console: bool = True) -> None:
        if not self.master:
            return
        if console:
            print(message, flush=True)
        with open(self.logfile, "a", encoding="utf-8") as file:
            print(message, file=file)

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        self.sum_(tensor)
        return tensor.div_(self.world)

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank: a decision that all ranks take alike."""
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)) > 0)

    def latest(self, seconds: float) -> float:
        """The greatest of the ranks' times, so that all of them see the same schedule."""
        value = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        if self.distributed:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def close(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


class Clock:
    """Wall clock that starts running when made; `pause`/`resume` around diagnostics that are not training."""

    def __init__(self):
        self.spent = 0.0
        self.since: float | None = None
        self.resume()

    def resume(self) -> None:
        torch.cuda.synchronize()
        self.since = time.perf_counter()

    def pause(self) -> None:
        torch.cuda.synchronize()
        self.spent = self.elapsed()
        self.since = None

    def elapsed(self) -> float:
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.spent + running


# ----------------------------------------------------------------------------------------------
# case operations: text -> text, lossless
# ----------------------------------------------------------------------------------------------

ESC = "\ue000"  # the next character stands for itself
CAP = "\ue001"  # the next letter is upper case
UPPER = "\ue002"  # the run of letters that follows is upper case
MARK = "\u2581"  # SentencePiece's own space mark; rare in text, must not be mistaken for a space
MARK_STAND_IN = "\ue004"
SPECIAL = {ESC: ESC, CAP: CAP, UPPER: UPPER, MARK_STAND_IN: MARK_STAND_IN, MARK: "\ue003", "\ue003": "\ue005"}
# what an escaped character was; "\ue005" cannot be met unescaped-as-literal because it is escaped itself below
SPECIAL["\ue005"] = "\ue006"
SPECIAL["\ue006"] = "\ue007"
SPECIAL["\ue007"] = "\ue008"
SPECIAL["\ue008"] = "\ue009"
UNSPECIAL = {put: char for char, put in SPECIAL.items()}
WORDS = re.compile(r"[A-Za-z]+|[\ue000-\ue002\ue003-\ue008\u2581]|[^A-Za-z\ue000-\ue008\u2581]+")


def encode_word(word: str) -> str:
    """One run of ASCII letters. Only ASCII letters are folded, so the number of bytes of a letter never changes."""
    if word.islower():
        return word
    low = word.lower()
    if word[0].isupper() and word[1:] == low[1:]:
        return CAP + low
    if len(word) > 1 and word.isupper():
        return UPPER + low
    return "".join(CAP + char.lower() if char.isupper() else char for char in word)


def encode_case(text: str) -> str:
    parts = []
    for match in WORDS.finditer(text):
        part = match.group()
        if part in SPECIAL:
            parts.append(ESC + SPECIAL[part])
        elif part[0].isascii() and part[0].isalpha():
            parts.append(encode_word(part))
        else:
            parts.append(part)
    return "".join(parts)


def decode_case(text: str) -> str:
    """Inverse of encode_case, checked for every document when the shards are written."""
    out = []
    i = 0
    upper = False
    while i < len(text):
        char = text[i]
        if char == ESC:
            out.append(UNSPECIAL[text[i + 1]])
            upper = False
            i += 2
            continue
        if char == CAP:
            out.append(text[i + 1].upper())
            i += 2
            continue
        if char == UPPER:
            upper = True
            i += 1
            continue
        if upper and not ("a" <= char <= "z"):
            upper = False
        out.append(char.upper() if upper else char)
        i += 1
    return "".join(out)


class OriginalBytes:
    """Bytes of the original text per token of a transformed document. Keeps the escape state across tokens."""

    def __init__(self, sp: spm.SentencePieceProcessor):
        self.sp = sp
        self.pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        self.kind = []
        for i in range(sp.vocab_size()):
            if sp.is_byte(i):
                self.kind.append("byte")
            elif sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                self.kind.append("none")
            else:
                self.kind.append("text")

    def count(self, ids: list[int]) -> list[int]:
        escaped = False
        counts = []
        for token in ids:
            if self.kind[token] == "none":
                counts.append(0)
                continue
            if self.kind[token] == "byte":
                counts.append(1)
                escaped = False
                continue
            total = 0
            for char in self.pieces[token].replace(MARK, " "):
                if escaped:
                    total += 3  # every escaped character is one of U+2581, U+E000..U+E008: three bytes
                    escaped = False
                elif char == ESC:
                    escaped = True
                elif char not in (CAP, UPPER):
                    total += len(char.encode("utf-8"))
            counts.append(total)
        return counts


# ----------------------------------------------------------------------------------------------
# `prepare`: documents -> shards
# ----------------------------------------------------------------------------------------------


def write_shard(path: Path, values: np.ndarray) -> None:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[0] = SHARD_MAGIC
    header[1] = SHARD_VERSION
    header[2] = len(values)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(values.astype("<u2").tobytes())


class ShardWriter:
    """Collects numbers and writes a shard whenever it is full."""

    def __init__(self, out: Path, stem: str, size: int):
        self.out, self.stem, self.size = out, stem, size
        self.index = 0
        self.pending: list[int] = []

    def add(self, values: list[int]) -> None:
        self.pending.extend(values)
        while len(self.pending) >= self.size:
            self.flush(self.size)

    def flush(self, count: int | None = None) -> None:
        count = len(self.pending) if count is None else count
        if not count:
            return
        write_shard(self.out / f"{self.stem}_{self.index:06d}.bin", np.array(self.pending[:count]))
        self.pending = self.pending[count:]
        self.index += 1


def read_documents(path: str):
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def prepare(argv: list[str]) -> None:
    """docs.jsonl in the official order: the first 50,000 documents are the validation set, the rest is for training."""
    parser = argparse.ArgumentParser(prog="train_gpt.py prepare")
    parser.add_argument("--docs", required=True)
    parser.add_argument("--out", default=Hyperparameters.data_path)
    parser.add_argument("--tokenizer", default=Hyperparameters.tokenizer_path)
    parser.add_argument("--val-docs", type=int, default=50_000)
    parser.add_argument("--max-train-docs", type=int, default=0)
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    options = parser.parse_args(argv)
    if not Hyperparameters.caseops:
        parser.error("only the case-normalised data set is written here")
    sp = spm.SentencePieceProcessor(model_file=options.tokenizer)
    counter = OriginalBytes(sp)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    val = ShardWriter(out, "fineweb_val", options.shard_tokens)
    val_bytes = ShardWriter(out, "fineweb_val_bytes", options.shard_tokens)
    train = ShardWriter(out, "fineweb_train", options.shard_tokens)
    for number, text in enumerate(read_documents(options.docs)):
        if options.max_train_docs and number >= options.val_docs + options.max_train_docs:
            break
        coded = encode_case(text)
        ids = sp.encode(coded)
        if number < options.val_docs:
            counts = counter.count(ids)
            if decode_case(coded) != text or sum(counts) != len(text.encode("utf-8")):
                raise ValueError(f"document {number} does not survive the round trip")
            val.add([BOS_ID, *ids])
            val_bytes.add([0, *counts])
        else:
            train.add([BOS_ID, *ids])
        if number % 100_000 == 0:
            print(f"prepare: {number} documents", flush=True)
    for writer in (val, val_bytes, train):
        writer.flush()


# ----------------------------------------------------------------------------------------------
# reading shards
# ----------------------------------------------------------------------------------------------


def read_shard(path: str | Path) -> Tensor:
    path = Path(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if header.size != HEADER_INTS or int(header[0]) != SHARD_MAGIC or int(header[1]) != SHARD_VERSION:
        raise ValueError(f"bad shard header: {path}")
    count = int(header[2])
    if path.stat().st_size != HEADER_INTS * 4 + count * 2:
        raise ValueError(f"bad shard size: {path}")
    values = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_INTS * 4)
    return torch.from_numpy(values.astype(np.uint16, copy=False))


def read_all(pattern: str) -> Tensor:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no files for {pattern}")
    return torch.cat([read_shard(file) for file in files]).contiguous()


class TokenStream:
    """Endless stream over the training shards in order."""

    def __init__(self, pattern: str, skip_shards: int = 0):
        self.files = sorted(glob.glob(pattern))
        if not self.files:
            raise FileNotFoundError(f"no files for {pattern}")
        self.index = skip_shards % len(self.files)
        self.tokens = read_shard(self.files[self.index])
        self.pos = 0

    def advance(self) -> None:
        self.index = (self.index + 1) % len(self.files)
        self.tokens = read_shard(self.files[self.index])
        self.pos = 0

    def take(self, count: int) -> Tensor:
        parts = []
        while count > 0:
            left = self.tokens.numel() - self.pos
            if left <= 0:
                self.advance()
                continue
            size = min(count, left)
            parts.append(self.tokens[self.pos : self.pos + size])
            self.pos += size
            count -= size
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TrainLoader:
    """Each call takes one contiguous span for all ranks and cuts this rank's rows out of it."""

    def __init__(self, pattern: str, run: Run, skip_shards: int = 0):
        self.stream = TokenStream(pattern, skip_shards)
        self.run = run

    def next_rows(self, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
        span = rows * seq_len + 1
        chunk = self.stream.take(span * self.run.world)
        local = chunk[self.run.rank * span : (self.run.rank + 1) * span].to(torch.int64)
        x = local[:-1].view(rows, seq_len)
        y = local[1:].view(rows, seq_len)
        return x.to(self.run.device, non_blocking=True), y.to(self.run.device, non_blocking=True)


def sentencepiece_tables(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """bytes without the leading space, has a leading space, is a boundary (control, unknown, unused)"""
    size = max(sp.vocab_size(), vocab_size)
    base_bytes = torch.zeros(size, dtype=torch.int32)
    leading = torch.zeros(size, dtype=torch.bool)
    boundary = torch.ones(size, dtype=torch.bool)
    for token in range(sp.vocab_size()):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        boundary[token] = False
        if sp.is_byte(token):
            base_bytes[token] = 1
            continue
        piece = sp.id_to_piece(token)
        if piece.startswith(MARK):
            leading[token] = True
            piece = piece[1:]
        base_bytes[token] = len(piece.replace(MARK, " ").encode("utf-8"))
    return base_bytes, leading, boundary


class ValidationSet:
    """The whole validation stream, and for each token the bytes of original text that it stands for."""

    def __init__(self, args: Hyperparameters, sp: spm.SentencePieceProcessor):
        self.tokens = read_all(args.val_files).to(torch.int64)
        if int(self.tokens[0]) != BOS_ID:
            raise ValueError("the validation stream must begin with a document")
        self.base_bytes, self.leading, self.boundary = sentencepiece_tables(sp, args.vocab_size)
        if args.caseops:
            self.nbytes = self.from_sidecar(args)
        else:
            self.nbytes = self.from_tables()
        self.targets = self.tokens.numel() - 1
        self.total_bytes = int(self.nbytes[1:].sum(dtype=torch.int64))

    def from_sidecar(self, args: Hyperparameters) -> Tensor:
        nbytes = read_all(args.val_byte_files).to(torch.int32)
        if nbytes.numel() != self.tokens.numel():
            raise ValueError(f"sidecar has {nbytes.numel()} entries for {self.tokens.numel()} tokens")
        return nbytes

    def from_tables(self) -> Tensor:
        """For the plain tokenizer, where pieces are the text itself."""
        nbytes = self.base_bytes[self.tokens].clone()
        space = self.leading[self.tokens[1:]] & ~self.boundary[self.tokens[:-1]]
        nbytes[1:] += space.to(torch.int32)
        return nbytes

    def documents(self) -> list[tuple[int, int]]:
        """(start, number of targets) per document. The last target of a document is the BOS of the next one, so
        that every token but the very first is a target exactly once."""
        starts = torch.nonzero(self.tokens == BOS_ID).flatten().tolist()
        ends = [*starts[1:], self.targets]
        docs = [(start, end - start) for start, end in zip(starts, ends)]
        return [doc for doc in docs if doc[1] > 0]


class Score:
    """Sums of losses and bytes, and a ledger of how often each target has been scored."""

    def __init__(self, val: ValidationSet, device: torch.device):
        self.val = val
        self.device = device
        self.nbytes = val.nbytes.to(device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.seen = torch.zeros(val.tokens.numel(), dtype=torch.int32, device=device)

    def add(self, where: Tensor, losses: Tensor) -> None:
        """where: indices into the stream of the targets; losses: one each, in nats"""
        self.loss += losses.to(torch.float64).sum()
        self.bytes += self.nbytes[where].to(torch.float64).sum()
        self.count += where.numel()
        self.seen.index_add_(0, where, torch.ones_like(where, dtype=torch.int32))

    def result(self, run: Run) -> tuple[float, float]:
        for part in (self.loss, self.bytes, self.count, self.seen):
            run.sum_(part)
        if int(self.seen[0]) != 0 or not bool((self.seen[1:] == 1).all()):
            raise RuntimeError("ledger: some target was not scored exactly once")
        if int(self.count) != self.val.targets or int(self.bytes) != self.val.total_bytes:
            raise RuntimeError("ledger: counts do not match the validation set")
        loss = float(self.loss / self.count)
        bpb = float(self.loss / math.log(2.0) / self.bytes)
        return loss, bpb


# ----------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------

CONTROL_NAMES = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "gate",
    "smear",
)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """fp32 master weights, cast to the dtype of the input."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dims: int, base: float, max_len: int):
        super().__init__()
        freqs = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), freqs)
        self.register_buffer("cos", angles.cos()[None, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, None], persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """x: batch, heads, time, head_dim; only the first `dims` are rotated"""
        length = x.size(-2)
        cos, sin = self.cos[:, :, :length].to(x.dtype), self.sin[:, :, :length].to(x.dtype)
        rot, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = rot.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        dim = args.model_dim
        self.heads = args.num_heads
        self.kv_heads = args.num_kv_heads
        self.head_dim = dim // args.num_heads
        self.c_q = CastedLinear(dim, dim)
        self.c_k = CastedLinear(dim, self.kv_heads * self.head_dim)
        self.c_v = CastedLinear(dim, self.kv_heads * self.head_dim)
        self.proj = CastedLinear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((self.heads,), args.qk_gain_init))
        self.gate_dims = args.gate_dims if args.attn_gate else 0
        if self.gate_dims:
            self.attn_gate = nn.Parameter(torch.zeros(self.heads, self.gate_dims))

    def forward(self, x: Tensor, rotary: Rotary, lora: LayerLoRA | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if lora is not None:
            q, k, v = q + lora.q(x), k + lora.k(x), v + lora.v(x)
        q = q.view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotary(norm(q)), rotary(norm(k))
        q = q * self.q_gain.to(q.dtype)[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2)
        if self.gate_dims:
            gate = 2.0 * torch.sigmoid(F.linear(x[..., : self.gate_dims], self.attn_gate.to(x.dtype)))
            y = y * gate.unsqueeze(-1)
        y = y.reshape(batch, length, dim)
        out = self.proj(y)
        if lora is not None:
            out = out + lora.o(y)
        return out


class MLP(nn.Module):
    def __init__(self, dim: int, mult: float):
        super().__init__()
        hidden = int(dim * mult)
        self.fc = CastedLinear(dim, hidden)
        self.proj = CastedLinear(hidden, dim)

    def forward(self, x: Tensor, lora: LayerLoRA | None) -> Tensor:
        y = self.proj(F.leaky_relu(self.fc(x), 0.5).square())
        return y if lora is None else y + lora.mlp(x)


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, layer: int):
        super().__init__()
        dim = args.model_dim
        self.attn = Attention(args)
        self.mlp = MLP(dim, args.mlp_mult)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.depth_scale = 1.0 / math.sqrt(layer + 1)

    def forward(self, x: Tensor, x0: Tensor, rotary: Rotary, lora: LayerLoRA | None = None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x) * self.depth_scale, rotary, lora)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.depth_scale, lora)


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args_softcap = args.logit_softcap
        self.num_layers = args.num_layers
        self.gate_dims = args.gate_dims
        self.embed = nn.Embedding(args.vocab_size, args.model_dim)
        self.blocks = nn.ModuleList(Block(args, layer) for layer in range(args.num_layers))
        self.rotary = Rotary(args.rope_dims, args.rope_base, max(args.train_seq_len, args.eval_seq_len))
        plain = list(range(args.num_layers))
        loop = list(range(args.loop_start, args.loop_end + 1))
        looped = plain[: args.loop_start] + loop * args.num_loops + plain[args.loop_end + 1 :]
        self.orders = {False: plain, True: looped}
        self.looping = False
        self.skip_weights = nn.Parameter(torch.ones(len(looped) // 2, args.model_dim))
        self.use_smear = args.smear
        if self.use_smear:
            self.smear_gate = nn.Parameter(torch.zeros(1, args.gate_dims))
            self.smear_scale = nn.Parameter(torch.zeros(()))
        self.reset_weights(args)

    def reset_weights(self, args: Hyperparameters) -> None:
        nn.init.normal_(self.embed.weight, mean=0.0, std=args.tied_init_std)
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def smear(self, x: Tensor, ids: Tensor, left: Tensor | None) -> Tensor:
        """Adds a little of the token before. left: the token before each row, where the row does not begin the stream."""
        first = torch.zeros_like(x[:, :1]) if left is None else norm(self.embed(left)).unsqueeze(1).to(x.dtype)
        before = torch.cat((first, x[:, :-1]), dim=1)
        gate = torch.sigmoid(F.linear(x[..., : self.gate_dims], self.smear_gate.to(x.dtype)))
        inside = (ids != BOS_ID).unsqueeze(-1).to(x.dtype)  # a document starts with nothing before it
        return x + self.smear_scale.to(x.dtype) * gate * before * inside

    def hidden(self, ids: Tensor, left: Tensor | None = None, lora: DocLoRA | None = None) -> Tensor:
        x = norm(self.embed(ids))
        if self.use_smear:
            x = self.smear(x, ids, left)
        x0 = x
        order = self.orders[self.looping]
        half = len(order) // 2
        skips: list[Tensor] = []
        for step, layer in enumerate(order):
            if step < half:
                skips.append(x)
            elif skips and step >= len(order) - half:
                x = x + self.skip_weights[len(skips) - 1].to(x.dtype) * skips.pop()
            x = self.blocks[layer](x, x0, self.rotary, None if lora is None else lora.layers[layer])
        return norm(x)

    def logits(self, x: Tensor, lora: DocLoRA | None = None) -> Tensor:
        out = F.linear(x, self.embed.weight.to(x.dtype))
        if lora is not None:
            out = out + lora.head(x)
        return self.args_softcap * torch.tanh(out.float() / self.args_softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.hidden(ids))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------
# LoRA: one adapter per document of a batch
# ----------------------------------------------------------------------------------------------


class RowLoRA(nn.Module):
    """A low-rank map with its own weights for each row of the batch."""

    def __init__(self, rows: int, dim_in: int, dim_out: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rows, rank, dim_in))
        self.up = nn.Parameter(torch.zeros(rows, dim_out, rank))
        bound = 1.0 / math.sqrt(dim_in)
        nn.init.uniform_(self.down, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.down.to(x.dtype).transpose(1, 2)), self.up.to(x.dtype).transpose(1, 2))


class LayerLoRA(nn.Module):
    def __init__(self, rows: int, dim: int, kv_dim: int, rank: int):
        super().__init__()
        self.q = RowLoRA(rows, dim, dim, rank)
        self.k = RowLoRA(rows, dim, kv_dim, rank)
        self.v = RowLoRA(rows, dim, kv_dim, rank)
        self.o = RowLoRA(rows, dim, dim, rank)
        self.mlp = RowLoRA(rows, dim, dim, rank)


class DocLoRA(nn.Module):
    def __init__(self, args: Hyperparameters, rows: int):
        super().__init__()
        dim = args.model_dim
        kv_dim = dim // args.num_heads * args.num_kv_heads
        self.layers = nn.ModuleList(LayerLoRA(rows, dim, kv_dim, args.ttt_rank) for _ in range(args.num_layers))
        self.head = RowLoRA(rows, dim, args.vocab_size, args.ttt_rank)


# ----------------------------------------------------------------------------------------------
# optimisers
# ----------------------------------------------------------------------------------------------


def newton_schulz(grad: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grad.bfloat16()
    x = x / (x.norm() + 1e-7)
    transposed = x.size(0) > x.size(1)
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum. Each rank computes the updates of its share of matrices; a sum brings them together."""

    def __init__(self, params, lr: float, momentum: float, steps: int, weight_decay: float, run: Run):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.run = run

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=torch.bfloat16)
            offset = 0
            for i, p in enumerate(params):
                if i % self.run.world == self.run.rank and p.grad is not None:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p.grad)
                    buf = state["momentum"]
                    buf.lerp_(p.grad, 1.0 - group["momentum"])
                    update = p.grad.lerp(buf, group["momentum"])
                    # row normalisation before Newton-Schulz evens out the neurons
                    update = update / (update.norm(dim=-1, keepdim=True) + 1e-7)
                    update = newton_schulz(update, group["steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[offset : offset + p.numel()] = update.reshape(-1)
                offset += p.numel()
            self.run.sum_(flat)
            offset = 0
            for p in params:
                update = flat[offset : offset + p.numel()].view_as(p).to(p.dtype)
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
                offset += p.numel()


def is_control(name: str) -> bool:
    return any(part in name for part in CONTROL_NAMES)


def make_optimizers(args: Hyperparameters, model: GPT, run: Run) -> tuple[list[torch.optim.Optimizer], Muon]:
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and not is_control(n)]
    scalars = [p for n, p in model.named_parameters() if is_control(n)]
    muon = Muon(matrices, args.matrix_lr, args.muon_momentum, args.muon_backend_steps, args.muon_wd, run)
    common = dict(betas=(args.beta1, args.beta2), eps=args.adam_eps, fused=True)
    embed = torch.optim.AdamW([model.embed.weight], lr=args.embed_lr, weight_decay=args.embed_wd, **common)
    control = torch.optim.AdamW(scalars, lr=args.scalar_lr, weight_decay=args.adam_wd, **common)
    covered = len(matrices) + len(scalars) + 1
    if covered != len(list(model.parameters())):
        raise RuntimeError(f"{covered} parameters have an optimiser, of {len(list(model.parameters()))}")
    optimizers = [muon, embed, control]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers, muon


class EMA:
    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = list(model.parameters())
        self.shadow = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, self.params, 1.0 - self.decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for p, s in zip(self.params, self.shadow):
            p.copy_(s)


# ----------------------------------------------------------------------------------------------
# quantisation: GPTQ (int6 matrices, int7 embedding), LQER on the worst tensors
# ----------------------------------------------------------------------------------------------


class Hessians:
    """Sums x xT of the inputs of every linear layer while the hooks are on."""

    def __init__(self, model: GPT):
        self.sums: dict[str, Tensor] = {}
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, CastedLinear):
                self.hooks.append(module.register_forward_pre_hook(self.hook(name + ".weight")))

    def hook(self, name: str):
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, 1).float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.size(1), x.size(1), device=x.device)
            self.sums[name].addmm_(x.T, x)

        return collect

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def collect_hessians(args: Hyperparameters, model: GPT, loader: TrainLoader, run: Run) -> dict[str, Tensor]:
    hessians = Hessians(model)
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(args.gptq_batches):
            x, _ = loader.next_rows(args.gptq_batch_rows, args.train_seq_len)
            hidden = model.hidden(x)
            flat = hidden.flatten(0, 1).float()
            if "embed.weight" not in hessians.sums:
                hessians.sums["embed.weight"] = torch.zeros(flat.size(1), flat.size(1), device=flat.device)
            hessians.sums["embed.weight"].addmm_(flat.T, flat)
    hessians.close()
    model.train()
    for matrix in hessians.sums.values():
        run.mean_(matrix)
    return hessians.sums


@torch.no_grad()
def fit_temperature(args: Hyperparameters, model: GPT, loader: TrainLoader, run: Run) -> float:
    """The scale of the logits with the least loss on a few training batches; it travels in the artifact."""
    totals = torch.zeros(len(args.temp_grid), dtype=torch.float64, device=run.device)
    model.eval()
    for _ in range(args.temp_batches):
        x, y = loader.next_rows(args.gptq_batch_rows, args.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model.logits(model.hidden(x)).flatten(0, 1)
        for i, temperature in enumerate(args.temp_grid):
            totals[i] += F.cross_entropy(logits / temperature, y.flatten()).double()
    model.train()
    run.sum_(totals)
    return float(args.temp_grid[int(totals.argmin())])


def row_scales(weight: Tensor, bits: int, clip: float) -> Tensor:
    qmax = 2 ** (bits - 1) - 1
    return (weight.std(dim=1) * clip / qmax).clamp_min(1e-6).half().float()


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, bits: int, clip: float, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Quantised matrix (int8 container) and its row scales."""
    qmax = 2 ** (bits - 1) - 1
    w = weight.float().clone()
    scales = row_scales(w, bits, clip)
    h = hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    perm = torch.argsort(h.diagonal(), descending=True)
    inverse_perm = torch.argsort(perm)
    w = w[:, perm]
    h = h[perm][:, perm]
    h.diagonal().add_(damp * h.diagonal().mean())
    hinv = torch.cholesky_inverse(torch.linalg.cholesky(h))
    hinv = torch.linalg.cholesky(hinv, upper=True)
    q = torch.zeros_like(w)
    columns = w.size(1)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = w[:, start:stop].clone()
        errors = torch.zeros_like(part)
        local = hinv[start:stop, start:stop]
        for i in range(stop - start):
            column = part[:, i]
            rounded = (column / scales).round().clamp(-qmax, qmax)
            q[:, start + i] = rounded
            error = (column - rounded * scales) / local[i, i]
            part[:, i:] -= error.unsqueeze(1) * local[i, i:].unsqueeze(0)
            errors[:, i] = error
        w[:, stop:] -= errors @ hinv[start:stop, stop:]
    return q[:, inverse_perm].to(torch.int8), scales


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(dim=1) / 127.0).clamp_min(1e-6).half()
    return (x / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def low_rank_residual(error: Tensor, rank: int) -> dict[str, Tensor]:
    u, s, v = torch.linalg.svd(error.float(), full_matrices=False)
    root = s[:rank].sqrt()
    left, left_scale = int8_rows((u[:, :rank] * root).T.contiguous())
    right, right_scale = int8_rows(root.unsqueeze(1) * v[:rank])
    return {"left": left, "left_scale": left_scale, "right": right, "right_scale": right_scale}


def residual_matrix(parts: dict[str, Tensor]) -> Tensor:
    left = parts["left"].float() * parts["left_scale"].float().unsqueeze(1)
    right = parts["right"].float() * parts["right_scale"].float().unsqueeze(1)
    return left.T @ right


def quantise(args: Hyperparameters, model: GPT, hessians: dict[str, Tensor], temperature: float) -> dict:
    """Everything that the evaluation needs, as small tensors."""
    packed: dict = {"q": {}, "plain": {}, "lqer": {}, "temperature": temperature, "looping": model.looping}
    errors: list[tuple[float, str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        if name not in hessians:
            packed["plain"][name] = tensor.detach().half().cpu() if tensor.is_floating_point() else tensor.cpu()
            continue
        embed = name == "embed.weight"
        bits = args.embed_bits if embed else args.matrix_bits
        clip = args.embed_clip if embed else args.matrix_clip
        q, scales = gptq(tensor, hessians[name], bits, clip, args.gptq_block, args.gptq_damp)
        packed["q"][name] = (q.cpu(), scales.half().cpu())
        error = tensor.float() - q.float() * scales.unsqueeze(1)
        errors.append((float(error.norm()), name, error))
    errors.sort(key=lambda entry: -entry[0])
    for _, name, error in errors[: args.lqer_top]:
        packed["lqer"][name] = {key: value.cpu() for key, value in low_rank_residual(error, args.lqer_rank).items()}
    return packed


def shuffle_bytes(raw: bytes, stride: int = 2) -> bytes:
    array = np.frombuffer(raw, dtype=np.uint8)
    pad = -len(array) % stride
    array = np.concatenate((array, np.zeros(pad, np.uint8)))
    return len(raw).to_bytes(8, "little") + array.reshape(-1, stride).T.tobytes()


def unshuffle_bytes(raw: bytes, stride: int = 2) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    array = np.frombuffer(raw, dtype=np.uint8, offset=8).reshape(stride, -1)
    return array.T.tobytes()[:size]


def pack_artifact(packed: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return brotli.compress(shuffle_bytes(buffer.getvalue()), quality=11, lgwin=24)


def unpack_artifact(blob: bytes) -> dict:
    return torch.load(io.BytesIO(unshuffle_bytes(brotli.decompress(blob))), map_location="cpu", weights_only=True)


def load_artifact(args: Hyperparameters, path: str, device: torch.device) -> tuple[GPT, float]:
    packed = unpack_artifact(Path(path).read_bytes())
    state = dict(packed["plain"])
    for name, (q, scales) in packed["q"].items():
        weight = q.float() * scales.float().unsqueeze(1)
        if name in packed["lqer"]:
            weight = weight + residual_matrix(packed["lqer"][name])
        state[name] = weight
    model = GPT(args).to(device)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    model.looping = bool(packed["looping"])
    return model, float(packed["temperature"])


# ----------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------


def lr_scale(args: Hyperparameters, frac: float) -> float:
    """frac: the part of the training time that is over"""
    if frac < 1.0 - args.warmdown_frac:
        return 1.0
    return max((1.0 - frac) / args.warmdown_frac, args.min_lr)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def micro_rows(args: Hyperparameters, run: Run) -> int:
    return args.train_batch_tokens // (args.train_seq_len * run.world * run.accum)


def forward_backward(args: Hyperparameters, ddp: nn.Module, loader: TrainLoader, run: Run) -> Tensor:
    """Gradients of one step; returns the loss of this rank."""
    total = torch.zeros((), device=run.device)
    for micro in range(run.accum):
        if isinstance(ddp, DDP):
            ddp.require_backward_grad_sync = micro == run.accum - 1
        x, y = loader.next_rows(micro_rows(args, run), args.train_seq_len)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = ddp(x, y)
        total += loss.detach()
        (loss / run.accum).backward()
    return total / run.accum


def compile_warmup(args: Hyperparameters, model: GPT, ddp: nn.Module, run: Run) -> None:
    """Lets the compiler see both depths, then puts the weights back. The optimisers are made after this."""
    saved = copy.deepcopy(model.state_dict())
    loader = TrainLoader(args.train_files, run)
    for looping in (False, True):
        model.looping = looping
        for _ in range(args.warmup_steps // 2):
            forward_backward(args, ddp, loader, run)
            model.zero_grad(set_to_none=True)
    model.looping = False
    model.load_state_dict(saved)


def train(args: Hyperparameters, run: Run, val: ValidationSet) -> tuple[GPT, Clock]:
    """Trains until the time that is left is what the quantisation needs. The clock goes on running."""
    seed_everything(args.seed)
    model = GPT(args).to(run.device)
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    ddp = DDP(compiled, device_ids=[run.local_rank], broadcast_buffers=False) if run.distributed else compiled
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    compile_warmup(args, model, ddp, run)
    optimizers, muon = make_optimizers(args, model, run)
    loader = TrainLoader(args.train_files, run)
    ema = EMA(model, args.ema_decay)
    budget = args.max_wallclock_seconds - args.gptq_reserve_seconds
    run.barrier()
    clock = Clock()
    step = 0
    while step < args.iterations:
        elapsed = run.latest(clock.elapsed())
        if elapsed >= budget:
            run.log(f"stopping_early: wallclock_cap train_time:{elapsed * 1000:.0f}ms step:{step}/{args.iterations}")
            break
        if args.val_loss_every and step and step % args.val_loss_every == 0:
            clock.pause()
            loss, bpb = evaluate_stream(args, model, val, run, stride=args.eval_seq_len)
            run.log(f"step:{step}/{args.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
            clock.resume()
        frac = elapsed / budget
        if not model.looping and frac >= args.loop_at:
            model.looping = True
            run.log(f"step:{step} layers {args.loop_start}-{args.loop_end} are looped from here")
        scale = lr_scale(args, frac)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
        ramp = min(step / args.muon_momentum_steps, 1.0)
        for group in muon.param_groups:
            group["momentum"] = (1.0 - ramp) * args.muon_momentum_start + ramp * args.muon_momentum
        loss = forward_backward(args, ddp, loader, run)
        if args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        ema.update()
        step += 1
        if step <= 5 or step % args.train_log_every == 0:
            ms = clock.elapsed() * 1000
            run.log(f"step:{step}/{args.iterations} train_loss:{float(loss):.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
    ema.copy_to_model()
    run.log("ema: weights are the average from here")
    return model, clock


def build_artifact(args: Hyperparameters, run: Run, model: GPT, clock: Clock) -> None:
    """Calibration and quantisation on the clock of the training, then the file."""
    calibration = TrainLoader(args.train_files, run, skip_shards=7)
    hessians = collect_hessians(args, model, calibration, run)
    temperature = fit_temperature(args, model, calibration, run)
    read_until = clock.elapsed()
    run.log(f"gptq: {len(hessians)} hessians, temperature {temperature}, train_time:{read_until * 1000:.0f}ms")
    if run.any(read_until > args.max_wallclock_seconds):
        raise RuntimeError("calibration ran over the training time, raise GPTQ_RESERVE_SECONDS")
    if run.master:
        packed = quantise(args, model, hessians, temperature)
        clock.pause()
        run.log(f"gptq: done, train_time:{clock.elapsed() * 1000:.0f}ms")
        blob = pack_artifact(packed)
        Path(args.artifact).write_bytes(blob)
        code = Path(__file__).read_bytes()
        total = len(blob) + len(code)
        run.log(f"Serialized model int6+brotli: {len(blob)} bytes")
        run.log(f"Code size: {len(code)} bytes")
        run.log(f"Total submission size: {total} bytes")
        if total > args.size_limit:
            raise RuntimeError(f"{total} bytes are more than {args.size_limit}")
    run.barrier()


# ----------------------------------------------------------------------------------------------
# evaluation on the stream (fixed weights)
# ----------------------------------------------------------------------------------------------


def stream_windows(targets: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """(end, first): the window ends before input `end`, and the targets of the inputs from `first` on are scored.
    The scored parts follow each other without overlap up to the last target."""
    windows = []
    first = 0
    while first < targets:
        end = min(max(seq_len, first + stride), targets)
        windows.append((end, first))
        first = end
    return windows


@torch.no_grad()
def evaluate_stream(
    args: Hyperparameters, model: GPT, val: ValidationSet, run: Run, stride: int, temperature: float = 1.0
) -> tuple[float, float]:
    """Loss and bits per byte with the weights as they are; each window sees at most eval_seq_len tokens."""
    was_training = model.training
    model.eval()
    score = Score(val, run.device)
    tokens = val.tokens.to(run.device)
    seq_len = min(args.eval_seq_len, val.targets)
    windows = stream_windows(val.targets, seq_len, stride)
    mine = windows[run.rank :: run.world]
    for at in range(0, len(mine), args.eval_rows):
        group = mine[at : at + args.eval_rows]
        ends = torch.tensor([end for end, _ in group], device=run.device)
        firsts = torch.tensor([first for _, first in group], device=run.device)
        starts = ends - seq_len
        inputs = starts.unsqueeze(1) + torch.arange(seq_len, device=run.device)
        left = tokens[(starts - 1).clamp_min(0)]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            x = model.hidden(tokens[inputs], left)
        fresh = inputs >= firsts.unsqueeze(1)
        where = inputs[fresh] + 1
        logits = model.logits(x[fresh].bfloat16().unsqueeze(0)).squeeze(0) / temperature
        losses = F.cross_entropy(logits, tokens[where], reduction="none")
        score.add(where, losses)
    model.train(was_training)
    return score.result(run)


# ----------------------------------------------------------------------------------------------
# n-gram hints and the tilt
# ----------------------------------------------------------------------------------------------


class HintTable:
    """For each context of `order` tokens the continuation that leads the vote so far (majority vote, one slot)."""

    def __init__(self, order: int):
        self.order = order
        self.slots: dict[tuple[int, ...], list[int]] = {}

    def look(self, history: list[int], end: int, min_votes: int) -> int:
        """The continuation expected after history[:end], or -1."""
        if end < self.order:
            return -1
        slot = self.slots.get(tuple(history[end - self.order : end]))
        if slot is None or slot[1] < min_votes:
            return -1
        return slot[0]

    def learn(self, history: list[int], end: int) -> None:
        """history[end] has become known: a vote for it after the context before it."""
        if end < self.order:
            return
        key = tuple(history[end - self.order : end])
        slot = self.slots.get(key)
        if slot is None:
            self.slots[key] = [history[end], 1]
        elif slot[0] == history[end]:
            slot[1] += 1
        elif slot[1] > 1:
            slot[1] -= 1
        else:
            slot[0], slot[1] = history[end], 1


def document_hints(args: Hyperparameters, ids: list[int]) -> tuple[list[int], list[float]]:
    """ids: a document's tokens, the last of them a target only. For target number j (= ids[j + 1]) a hint and its
    strength, from ids[: j + 1] alone; the tables begin empty with each document."""
    tables = [HintTable(order) for order in args.tilt_orders]
    hints: list[int] = []
    betas: list[float] = []
    for j in range(len(ids) - 1):
        hint, beta = -1, 0.0
        for table, strength in zip(tables, args.tilt_betas):
            hint = table.look(ids, j + 1, args.tilt_min_votes)
            if hint >= 0:
                beta = strength
                break
        hints.append(hint)
        betas.append(beta)
        for table in tables:
            table.learn(ids, j + 1)
    return hints, betas


def batch_hints(
    args: Hyperparameters, val: ValidationSet, batch: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(rows, longest) hints and betas; 0 strength where there is no hint or no document."""
    longest = max(length for _, length in batch)
    hints = torch.zeros(len(batch), longest, dtype=torch.int64)
    betas = torch.zeros(len(batch), longest)
    for row, (start, length) in enumerate(batch):
        ids = val.tokens[start : start + length + 1].tolist()
        row_hints, row_betas = document_hints(args, ids)
        hints[row, :length] = torch.tensor(row_hints).clamp_min(0)
        betas[row, :length] = torch.tensor(row_betas)
    return hints.to(device), betas.to(device)


def tilted_losses(logp: Tensor, targets: Tensor, hints: Tensor, betas: Tensor) -> Tensor:
    """p'(a) = p(a) * exp(beta * [a = hint]) / z with z = 1 + p(hint) * (exp(beta) - 1), the sum over the vocabulary."""
    base = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    at_hint = logp.gather(-1, hints.unsqueeze(-1)).squeeze(-1)
    log_z = torch.log1p(at_hint.exp() * torch.expm1(betas))
    return -(base + betas * (targets == hints) - log_z)


# ----------------------------------------------------------------------------------------------
# evaluation with test-time training
# ----------------------------------------------------------------------------------------------


def split_phases(args: Hyperparameters, docs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Consecutive parts of the documents; between two parts the base weights learn from the former."""
    bounds = [0, *[b for b in args.phase_bounds if b < len(docs)], len(docs)]
    return [docs[a:b] for a, b in zip(bounds, bounds[1:])]


def length_batches(args: Hyperparameters, docs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Documents of like length together, the longest first; few rows where they are long."""
    order = sorted(docs, key=lambda doc: (-doc[1], doc[0]))
    batches = []
    at = 0
    while at < len(order):
        rows = max(1, min(args.ttt_docs, args.ttt_batch_tokens // order[at][1]))
        batches.append(order[at : at + rows])
        at += rows
    return batches


def new_adapters(args: Hyperparameters, rows: int, device: torch.device) -> tuple[DocLoRA, torch.optim.Optimizer]:
    lora = DocLoRA(args, rows).to(device)
    optimizer = torch.optim.AdamW(
        lora.parameters(), lr=args.ttt_lr, betas=(0.9, args.ttt_beta2), weight_decay=args.ttt_wd, fused=True
    )
    return lora, optimizer


class Evaluator:
    """Scores documents chunk by chunk; after a chunk is scored, the adapters of its documents learn from it."""

    def __init__(self, args: Hyperparameters, model: GPT, val: ValidationSet, run: Run, temperature: float, clock: Clock):
        self.args = args
        self.model = model
        self.val = val
        self.run = run
        self.temperature = temperature
        self.clock = clock
        self.tokens = val.tokens.to(run.device)
        self.score = Score(val, run.device)
        self.skipped_updates = 0

    def window(self, starts: Tensor, lengths: Tensor, c0: int, c1: int) -> tuple[Tensor, Tensor, int]:
        """Inputs for the targets c0..c1 of each document, the token left of them, and where the chunk begins in it."""
        lo = max(0, c1 - self.args.eval_seq_len)
        offsets = torch.arange(lo, c1, device=self.run.device)
        where = starts.unsqueeze(1) + offsets
        inside = offsets < lengths.unsqueeze(1)
        ids = torch.where(inside, self.tokens[where.clamp_max(self.val.targets)], 0)
        left = self.tokens[(starts + lo - 1).clamp_min(0).clamp_max(self.val.targets)]
        return ids, left, c0 - lo

    def chunk_logp(self, ids: Tensor, left: Tensor, chunk_at: int, lora: DocLoRA | None) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            x = self.model.hidden(ids, left, lora)[:, chunk_at:]
            logits = self.model.logits(x, lora)
        return F.log_softmax(logits.float() / self.temperature, dim=-1)

    def learn(self, nll: Tensor, weights: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step; the mean over a document's chunk, summed over documents, so that rows stay independent."""
        per_doc = (nll * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
        optimizer.zero_grad(set_to_none=True)
        per_doc.sum().backward()
        optimizer.step()

    def batch(self, batch: list[tuple[int, int]]) -> None:
        args, device = self.args, self.run.device
        starts = torch.tensor([start for start, _ in batch], device=device)
        lengths = torch.tensor([length for _, length in batch], device=device)
        longest = max(length for _, length in batch)
        lora, optimizer = new_adapters(args, len(batch), device)
        if args.tilt:
            hints, betas = batch_hints(args, self.val, batch, device)
        for c0 in range(0, longest, args.ttt_chunk):
            c1 = min(c0 + args.ttt_chunk, longest)
            adapt = c1 < longest and self.clock.elapsed() < args.eval_budget_s
            self.skipped_updates += int(c1 < longest and not adapt)
            ids, left, chunk_at = self.window(starts, lengths, c0, c1)
            offsets = torch.arange(c0, c1, device=device)
            inside = offsets < lengths.unsqueeze(1)
            where = starts.unsqueeze(1) + offsets + 1
            targets = torch.where(inside, self.tokens[where.clamp_max(self.val.targets)], 0)
            with torch.set_grad_enabled(adapt):
                logp = self.chunk_logp(ids, left, chunk_at, lora)
                nll = -logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            with torch.no_grad():
                if args.tilt:
                    losses = tilted_losses(logp.detach(), targets, hints[:, c0:c1], betas[:, c0:c1])
                else:
                    losses = nll.detach()
                self.score.add(where[inside], losses[inside])
            if adapt:
                goes_on = (lengths > c1).unsqueeze(1)
                self.learn(nll, (inside & goes_on).to(nll.dtype), optimizer)

    def learn_base(self, begin: int, end: int) -> None:
        """SGD on the stream from `begin` to `end`, all of whose targets have been scored, shared among the ranks."""
        args, run, model = self.args, self.run, self.model
        seq_len = args.train_seq_len
        per_rank = (end - begin) // seq_len // run.world
        steps = per_rank // args.phase_rows
        params = [p for p in model.parameters()]
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(params, lr=args.phase_lr, momentum=args.phase_momentum)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = args.phase_lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            row = (step * run.world + run.rank) * args.phase_rows
            at = begin + row * seq_len
            chunk = self.tokens[at : at + args.phase_rows * seq_len + 1]
            x = chunk[:-1].view(args.phase_rows, seq_len)
            y = chunk[1:].view(args.phase_rows, seq_len)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for p in params:
                if p.grad is not None:
                    run.mean_(p.grad)
            torch.nn.utils.clip_grad_norm_(params, args.phase_clip)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        run.log(f"ttt: base weights took {steps} steps on tokens {begin}..{end}")

    def run_phases(self) -> tuple[float, float]:
        args, run = self.args, self.run
        self.model.eval()
        self.model.requires_grad_(False)
        phases = split_phases(args, self.val.documents())
        for number, docs in enumerate(phases):
            batches = length_batches(args, docs)
            for batch in batches[run.rank :: run.world]:
                self.batch(batch)
            run.barrier()  # all of this phase is scored, on every rank
            run.log(f"ttt: phase {number + 1}/{len(phases)} docs:{len(docs)} eval_time:{self.clock.elapsed() * 1000:.0f}ms")
            late = run.any(self.clock.elapsed() > args.eval_budget_s)
            if number + 1 < len(phases) and not late:
                self.learn_base(docs[0][0], docs[-1][0] + docs[-1][1])
        if self.skipped_updates:
            print(f"rank {run.rank}: {self.skipped_updates} updates left out for want of time", flush=True)
        return self.score.result(run)


def evaluate(args: Hyperparameters, run: Run, val: ValidationSet) -> None:
    """Reads the artifact back and makes the number that is reported, all of it on one clock."""
    clock = Clock()
    model, temperature = load_artifact(args, args.artifact, run.device)
    loss, bpb = evaluate_stream(args, model, val, run, args.eval_seq_len, temperature)
    run.log(f"quantized val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{clock.elapsed() * 1000:.0f}ms")
    if args.eval_mode == "sliding":
        name = "quantized_sliding_window"
        loss, bpb = evaluate_stream(args, model, val, run, args.eval_stride, temperature)
    else:
        name = "quantized_ttt_phased"
        loss, bpb = Evaluator(args, model, val, run, temperature, clock).run_phases()
    took = clock.elapsed()
    run.log(f"{name} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{took * 1000:.0f}ms")
    if took > 600.0:
        run.log("warning: the evaluation took more than 600 s, this run does not count")
    run.log(f"final_bpb {bpb:.8f} tokens:{val.targets} bytes:{val.total_bytes}")


# ----------------------------------------------------------------------------------------------


def log_environment(args: Hyperparameters, run: Run, val: ValidationSet) -> None:
    run.log(f"Running Python {sys.version}", console=False)
    run.log(f"Running PyTorch {torch.__version__}", console=False)
    run.log(f"run_id:{args.run_id} seed:{args.seed} world_size:{run.world} grad_accum_steps:{run.accum}")
    for name in sorted(vars(Hyperparameters)):
        if not name.startswith("_"):
            run.log(f"  {name}: {getattr(args, name)}", console=False)
    files = sorted(glob.glob(args.train_files))
    run.log(f"train_loader: {len(files)} shards of {args.train_files}")
    run.log(f"val_loader: {val.targets + 1} tokens, {len(val.documents())} documents, {val.total_bytes} bytes of text")


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "prepare":
        prepare(sys.argv[2:])
        return
    args = Hyperparameters()
    run = Run(args)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    sp = spm.SentencePieceProcessor(model_file=args.tokenizer_path)
    if sp.vocab_size() != args.vocab_size:
        raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, VOCAB_SIZE is {args.vocab_size}")
    val = ValidationSet(args, sp)
    log_environment(args, run, val)
    model, clock = train(args, run, val)
    run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 1024 // 1024} MiB")
    build_artifact(args, run, model, clock)
    del model
    torch.cuda.empty_cache()
    evaluate(args, run, val)
    run.close()


if __name__ == "__main__":
    main()
