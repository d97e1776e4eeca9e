"""Parameter Golf submission: lossless caps + sparse attention gate + GPTQ/LQER + phased score-first TTT.

The file does everything, in three stages:

    python train_gpt.py prepare --docs docs_selected.jsonl --tokenizer sp8192_caps.model --out DIR
    torchrun --standalone --nproc_per_node=8 train_gpt.py                # train, quantise, evaluate
    EVAL_ONLY=1 torchrun --standalone --nproc_per_node=8 train_gpt.py    # evaluate the artifact on disk

Summary of the recipe
---------------------
* SP8192 tokenizer trained on text whose ASCII capitals were moved into three operator symbols
  (see :class:`CapsCodec`). The transformation is lossless; bytes are those of the original text.
* 11 layers, d=512, GQA 8/4, partial RoPE, sparse attention gate, smear gate, U-Net skips,
  layers 4-5 looped for the later part of training.
* Muon for matrices, AdamW for the rest, EMA of the weights.
* AWQ-lite column scaling -> GPTQ int6 -> LQER low-rank correction for the worst matrices.
* Per-group compression: each group of tensors takes the shortest of brotli, lzma and lrzip.
* Evaluation: one LoRA per document, scored chunk by chunk and updated after each chunk;
  between the first prefixes of documents a global SGD phase on what was scored so far.
* A continuation hint from the earlier text of the document tilts one logit before the softmax.
"""

from __future__ import annotations

import argparse, glob, io, json, lzma, math, os, random, re
import shutil, struct, subprocess, sys, tempfile, time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import brotli
except ImportError:  # the groups then fall back to lzma
    brotli = None

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
ARTIFACT_MAGIC = b"PGA1"
SIZE_LIMIT = 16_000_000
SCORED_DOCS = 50_000

# ==== settings

def read_env(name: str, default: Any) -> Any:
    """Read one setting from the environment, with the type of its default."""
    raw = os.environ.get(name)
    if raw is None:
        return default
    if isinstance(default, bool):
        return raw.strip().lower() not in ("", "0", "false", "no")
    return type(default)(raw)


def opt(name: str, default: Any) -> Any:
    """A dataclass field that may be overridden by the environment variable `name`."""
    return field(default_factory=lambda: read_env(name, default))


@dataclass
class DataSettings:
    """Where the shards and the tokenizer lie."""

    data_dir: str = opt("DATA_DIR", "./data/datasets/fineweb_sp8192_caps")
    tokenizer: str = opt("TOKENIZER_PATH", "./data/tokenizers/sp8192_caps.model")
    byte_source: str = opt("BYTE_SOURCE", "table")  # "table" or "sidecar"

    @property
    def train_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_train_*.bin")

    @property
    def val_glob(self) -> str:
        return os.path.join(self.data_dir, "fineweb_val_*.bin")

    @property
    def val_bytes_glob(self) -> str:
        return os.path.join(self.data_dir, "bytes_val_*.bin")


@dataclass
class ModelSettings:
    """Shape of the network."""

    vocab: int = opt("VOCAB_SIZE", 8192)
    layers: int = opt("NUM_LAYERS", 11)
    dim: int = opt("MODEL_DIM", 512)
    heads: int = opt("NUM_HEADS", 8)
    kv_heads: int = opt("NUM_KV_HEADS", 4)
    mlp_hidden: int = opt("MLP_HIDDEN", 1920)
    rope_dims: int = opt("ROPE_DIMS", 16)
    rope_base: float = opt("ROPE_BASE", 10000.0)
    gate_dims: int = opt("GATE_DIMS", 12)
    loop_first: int = opt("LOOP_FIRST", 4)
    loop_last: int = opt("LOOP_LAST", 5)
    qk_gain: float = opt("QK_GAIN", 5.0)
    softcap: float = opt("LOGIT_SOFTCAP", 30.0)
    embed_std: float = opt("EMBED_STD", 0.005)


@dataclass
class TrainSettings:
    """Optimisers, schedule and the clock."""

    seed: int = opt("SEED", 1337)
    iterations: int = opt("ITERATIONS", 20000)
    wallclock: float = opt("MAX_WALLCLOCK_SECONDS", 600.0)
    reserve: float = opt("QUANT_RESERVE_SECONDS", 40.0)
    batch_tokens: int = opt("TRAIN_BATCH_TOKENS", 786432)
    seq_len: int = opt("TRAIN_SEQ_LEN", 2048)
    loop_from: float = opt("LOOP_FROM", 0.35)
    warmdown: float = opt("WARMDOWN_FRAC", 0.72)
    min_lr: float = opt("MIN_LR_FRAC", 0.0)
    matrix_lr: float = opt("MATRIX_LR", 0.022)
    matrix_wd: float = opt("MATRIX_WD", 0.095)
    muon_momentum: float = opt("MUON_MOMENTUM", 0.97)
    muon_steps: int = opt("MUON_STEPS", 5)
    embed_lr: float = opt("EMBED_LR", 0.03)
    embed_wd: float = opt("EMBED_WD", 0.085)
    scalar_lr: float = opt("SCALAR_LR", 0.02)
    adam_beta1: float = opt("ADAM_BETA1", 0.9)
    adam_beta2: float = opt("ADAM_BETA2", 0.95)
    clip_norm: float = opt("GRAD_CLIP_NORM", 0.3)
    ema_decay: float = opt("EMA_DECAY", 0.9965)
    warmup_steps: int = opt("WARMUP_STEPS", 10)
    val_every: int = opt("VAL_LOSS_EVERY", 4000)
    log_every: int = opt("TRAIN_LOG_EVERY", 250)
    run_id: str = opt("RUN_ID", "pabay")


@dataclass
class QuantSettings:
    """GPTQ, AWQ-lite and LQER."""

    bits: int = opt("MATRIX_BITS", 6)
    clip_sigmas: float = opt("MATRIX_CLIP_SIGMAS", 12.85)
    embed_bits: int = opt("EMBED_BITS", 8)
    embed_clip_sigmas: float = opt("EMBED_CLIP_SIGMAS", 20.0)
    calib_batches: int = opt("GPTQ_CALIBRATION_BATCHES", 16)
    calib_tokens: int = opt("GPTQ_BATCH_TOKENS", 262144)
    block: int = opt("GPTQ_BLOCK", 128)
    damp: float = opt("GPTQ_DAMP", 0.01)
    awq_alpha: float = opt("AWQ_ALPHA", 0.35)
    lqer_rank: int = opt("LQER_RANK", 4)
    lqer_top: int = opt("LQER_TOP", 8)
    artifact: str = opt("ARTIFACT", "final_model.pga")


@dataclass
class EvalSettings:
    """Test-time training, hints and the evaluation clock."""

    eval_only: bool = opt("EVAL_ONLY", False)
    plain_eval: bool = opt("PLAIN_EVAL", True)
    seq_len: int = opt("EVAL_SEQ_LEN", 2048)
    chunk: int = opt("TTT_CHUNK", 64)
    batch_docs: int = opt("TTT_BATCH_DOCS", 32)
    lora_rank: int = opt("TTT_LORA_RANK", 96)
    lora_lr: float = opt("TTT_LORA_LR", 1e-4)
    lora_wd: float = opt("TTT_WEIGHT_DECAY", 0.5)
    phases: int = opt("PHASED_TTT_PHASES", 3)
    prefix_docs: int = opt("PHASED_TTT_PREFIX_DOCS", 2000)
    sgd_lr: float = opt("GLOBAL_TTT_LR", 1e-3)
    sgd_momentum: float = opt("GLOBAL_TTT_MOMENTUM", 0.9)
    sgd_epochs: int = opt("GLOBAL_TTT_EPOCHS", 1)
    sgd_batch_seqs: int = opt("GLOBAL_TTT_BATCH_SEQS", 4)
    sgd_clip: float = opt("GLOBAL_TTT_CLIP", 1.0)
    hint_order: int = opt("HINT_ORDER", 4)
    hint_fit_tokens: int = opt("HINT_FIT_TOKENS", 524288)
    budget: float = opt("EVAL_BUDGET_SECONDS", 600.0)
    adapt_until: float = opt("EVAL_ADAPT_UNTIL", 520.0)


@dataclass
class Settings:
    """Everything that can be set."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    quant: QuantSettings = field(default_factory=QuantSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

# ==== distributed context and logging

@dataclass(frozen=True)
class Cluster:
    """Rank, world size and the few collectives that the script needs."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls) -> Cluster:
        rank = int(os.environ.get("RANK", "0"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group(backend="nccl", device_id=device)
        return cls(rank, world, device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """In-place sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def from_main(self, value: float) -> float:
        """The value that rank 0 holds; keeps clocks and decisions in step."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, src=0)
        return float(box.item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def average_grads(self, params: Sequence[nn.Parameter]) -> None:
        """Average the gradients of all ranks through one flat buffer."""
        if self.world == 1:
            return
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        at = 0
        for grad in grads:
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            at += grad.numel()

    def stop(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


class RunLog:
    """Prints on rank 0 and keeps a copy in `logs/`."""

    def __init__(self, cluster: Cluster, run_id: str) -> None:
        self.on = cluster.main
        self.path = Path("logs") / f"{run_id}.txt"
        if self.on:
            self.path.parent.mkdir(exist_ok=True)

    def __call__(self, message: str) -> None:
        if not self.on:
            return
        print(message, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")


class Stopwatch:
    """A wall clock that waits for the GPU before it is read."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.begin = time.perf_counter()
        self.paused = 0.0

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter() - self.begin - self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the body (logging of a validation loss) out of the reading."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.paused += time.perf_counter() - start


# --------------------------------------------------------------------------------------
# Lossless caps
# --------------------------------------------------------------------------------------

MARK = "\u2581"
TITLE = "\ue000"  # the next letter is a capital
UPPER = "\ue001"  # the next run of letters is in capitals
ESCAPE = "\ue002"  # the next letter names one of ESCAPED
ESCAPED = (TITLE, UPPER, ESCAPE, MARK)

# Bytes of the original text that an operator stands for. An escaped character has three bytes in UTF-8;
# the letter after the operator brings one of them, the operator the other two.
OPERATOR_BYTES = {TITLE: 0, UPPER: 0, ESCAPE: 2}


class CapsCodec:
    """Moves ASCII capitals into operators, and back. Only A-Z are touched, so no byte length changes.

    " The USA" becomes "<T> the<U> usa": the operator stands before the space so that the pieces
    "_the" and "_usa" are the ones of the lower-case words. Characters that the codec or SentencePiece
    uses itself are escaped.
    """

    TOKEN = re.compile("(?P<escaped>[" + "".join(ESCAPED) + "])|(?P<word> ?[A-Za-z]+)")

    def encode(self, text: str) -> str:
        return self.TOKEN.sub(self._operator_form, text)

    def _operator_form(self, match: re.Match[str]) -> str:
        if match["escaped"]:
            return ESCAPE + "abcd"[ESCAPED.index(match["escaped"])]
        word = match["word"]
        space = " " if word[0] == " " else ""
        letters = word[len(space) :]
        if letters.islower():
            return word
        if len(letters) > 1 and letters.isupper():
            return UPPER + space + letters.lower()
        if letters[0].isupper():
            out = [TITLE, space, letters[0].lower()]
        else:
            out = [space, letters[0]]
        for letter in letters[1:]:
            out.append(TITLE + letter.lower() if letter.isupper() else letter)
        return "".join(out)

    def decode(self, text: str) -> str:
        out: list[str] = []
        mode = ""
        for char in text:
            if mode == ESCAPE:
                out.append(ESCAPED["abcd".index(char)])
                mode = ""
            elif char in (TITLE, UPPER, ESCAPE):
                mode = char
            elif mode == TITLE:
                out.append(char.upper())
                if char != " ":
                    mode = ""
            elif mode == UPPER:
                out.append(char.upper() if "a" <= char <= "z" else char)
                if char != " ":
                    mode = "run" if "a" <= char <= "z" else ""
            elif mode == "run" and "a" <= char <= "z":
                out.append(char.upper())
            else:
                mode = ""
                out.append(char)
        return "".join(out)

# ==== bytes of the original text

class ByteTable:
    """Exact number of bytes of the original text behind every token.

    `base` counts a piece without its leading space, `space` says whether it has one. The space of the
    first piece after a boundary token is SentencePiece's own prefix and stands for nothing.
    """

    def __init__(self, base: Tensor, space: Tensor, boundary: Tensor) -> None:
        self.base = base
        self.space = space
        self.boundary = boundary

    @classmethod
    def from_tokenizer(cls, sp: spm.SentencePieceProcessor, device: torch.device) -> ByteTable:
        size = int(sp.get_piece_size())
        base = torch.zeros(size, dtype=torch.int64)
        space = torch.zeros(size, dtype=torch.bool)
        boundary = torch.zeros(size, dtype=torch.bool)
        for token in range(size):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                boundary[token] = True
                continue
            if sp.is_byte(token):
                base[token] = 1
                continue
            piece = sp.id_to_piece(token)
            if piece in OPERATOR_BYTES:
                base[token] = OPERATOR_BYTES[piece]
                continue
            if piece.startswith(MARK):
                space[token] = True
                piece = piece[1:]
            base[token] = len(piece.replace(MARK, " ").encode("utf-8"))
        return cls(base.to(device), space.to(device), boundary.to(device))

    def count(self, before: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target, given the token that stands before it."""
        return self.base[target] + (self.space[target] & ~self.boundary[before]).to(torch.int64)

# ==== shards

def write_shard(path: Path, values: np.ndarray) -> None:
    """Write uint16 values behind the usual header."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = (SHARD_MAGIC, SHARD_VERSION, len(values))
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(values.astype("<u2").tobytes())


def read_shard(path: str) -> np.ndarray:
    """Map the values of one shard; raises ValueError when the header is not ours."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) != SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path} is not a token shard")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS, shape=(int(header[2]),))


def shard_files(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no shards match {pattern}")
    return files


class TokenStream:
    """An endless stream over the training shards, in order."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.index = 0
        self.at = 0
        self.tokens = read_shard(files[0])

    def take(self, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            if self.at >= len(self.tokens):
                self.index = (self.index + 1) % len(self.files)
                self.tokens = read_shard(self.files[self.index])
                self.at = 0
            part = self.tokens[self.at : self.at + count]
            parts.append(np.asarray(part))
            self.at += len(part)
            count -= len(part)
        return np.concatenate(parts)


class TrainLoader:
    """Cuts the stream into equal spans, one per rank."""

    def __init__(self, pattern: str, cluster: Cluster, seq_len: int) -> None:
        self.stream = TokenStream(shard_files(pattern))
        self.cluster = cluster
        self.seq_len = seq_len

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank, for a global batch of so many tokens."""
        local = tokens // self.cluster.world // self.seq_len * self.seq_len
        span = local + 1
        chunk = self.stream.take(span * self.cluster.world)
        mine = chunk[self.cluster.rank * span : (self.cluster.rank + 1) * span]
        flat = torch.from_numpy(mine.astype(np.int64)).pin_memory().to(self.cluster.device, non_blocking=True)
        return flat[:-1].view(-1, self.seq_len), flat[1:].view(-1, self.seq_len)


@dataclass(frozen=True)
class Document:
    """One document of the stream. Its targets are the positions start + 1 ... stop.

    The last target is the boundary token of the next document, so that the targets of all documents
    together are every position of the stream but the first.
    """

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def find_documents(tokens: np.ndarray, bos: int) -> list[Document]:
    """The documents of a stream that begins with a boundary token."""
    starts = np.flatnonzero(tokens == bos).tolist()
    if not starts or starts[0] != 0:
        raise ValueError("the stream does not begin with a document")
    stops = starts[1:] + [len(tokens) - 1]
    return [Document(a, b) for a, b in zip(starts, stops) if b > a]


@dataclass
class ValidationSet:
    """The validation stream, its documents, and the bytes of each position."""

    stream: Tensor  # int32, on the device
    documents: list[Document]
    bos: int
    sidecar: Tensor | None

    @property
    def targets(self) -> int:
        return len(self.stream) - 1

    @classmethod
    def load(cls, settings: DataSettings, bos: int, device: torch.device) -> ValidationSet:
        tokens = np.concatenate([read_shard(f) for f in shard_files(settings.val_glob)])
        sidecar = None
        if settings.byte_source == "sidecar":
            sizes = np.concatenate([read_shard(f) for f in shard_files(settings.val_bytes_glob)])
            if len(sizes) != len(tokens):
                raise ValueError(f"sidecar has {len(sizes)} entries, the stream {len(tokens)} tokens")
            sidecar = torch.from_numpy(sizes.astype(np.int64)).to(device)
        documents = find_documents(tokens, bos)
        if len(documents) != SCORED_DOCS:
            raise ValueError(f"{len(documents)} validation documents instead of {SCORED_DOCS}")
        return cls(torch.from_numpy(tokens.astype(np.int32)).to(device), documents, bos, sidecar)

# ==== preparation of the data (run once, offline)

class ShardWriter:
    """Collects tokens and writes shards of a fixed size."""

    def __init__(self, out: Path, stem: str, size: int = 100_000_000) -> None:
        self.out, self.stem, self.size = out, stem, size
        self.parts: list[np.ndarray] = []
        self.held = 0
        self.number = 0

    def add(self, values: np.ndarray) -> None:
        self.parts.append(values.astype(np.uint16))
        self.held += len(values)
        while self.held >= self.size:
            self._write(self.size)

    def _write(self, count: int) -> None:
        whole = np.concatenate(self.parts)
        write_shard(self.out / f"{self.stem}_{self.number:06d}.bin", whole[:count])
        self.number += 1
        self.parts = [whole[count:]]
        self.held = len(whole) - count

    def close(self) -> None:
        if self.held:
            self._write(self.held)


def encode_document(sp: spm.SentencePieceProcessor, codec: CapsCodec, table: ByteTable, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one document with its boundary token in front, and the original bytes of each."""
    ids = [sp.bos_id(), *sp.encode(codec.encode(text))]
    flat = torch.tensor(ids, dtype=torch.int64)
    sizes = torch.zeros_like(flat)
    sizes[1:] = table.count(flat[:-1], flat[1:])
    if codec.decode(sp.decode(ids[1:])) != text:
        raise ValueError(f"document does not survive the tokenizer: {text[:80]!r}")
    if int(sizes.sum()) != len(text.encode("utf-8")):
        raise ValueError(f"bytes of document do not add up: {text[:80]!r}")
    return flat.numpy(), sizes.numpy()


def prepare(argv: Sequence[str]) -> None:
    """Tokenise docs_selected.jsonl: the first documents are validation, the rest training."""
    parser = argparse.ArgumentParser(prog="train_gpt.py prepare")
    parser.add_argument("--docs", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--val-docs", type=int, default=50_000, help="documents held back from training")
    parser.add_argument("--train-tokens", type=int, default=10_000_000_000)
    args = parser.parse_args(argv)

    sp = spm.SentencePieceProcessor(model_file=args.tokenizer)
    codec = CapsCodec()
    table = ByteTable.from_tokenizer(sp, torch.device("cpu"))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    val, sidecar, train = ShardWriter(out, "fineweb_val"), ShardWriter(out, "bytes_val"), ShardWriter(out, "fineweb_train")
    written = 0
    with open(args.docs, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            tokens, sizes = encode_document(sp, codec, table, json.loads(line)["text"])
            if number < SCORED_DOCS:
                val.add(tokens)
                sidecar.add(sizes)
            if number >= args.val_docs:
                train.add(tokens)
                written += len(tokens)
            if written >= args.train_tokens:
                break
    for writer in (val, sidecar, train):
        writer.close()
    print(f"prepared {out}: {written} training tokens")

# ==== model

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    """A bias-free linear layer that keeps fp32 weights and computes in the type of its input."""

    def __init__(self, d_in: int, d_out: int, zero_init: bool = False) -> None:
        super().__init__(d_in, d_out, bias=False)
        if zero_init:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary positions on the first `dims` channels of each head."""

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        inv_freq = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, heads, time, head_dim)"""
        angle = torch.outer(torch.arange(x.size(2), device=x.device, dtype=torch.float32), self.inv_freq)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x[..., : self.dims], x[..., self.dims :]
        a, b = turned.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class BatchedLora(nn.Module):
    """One low-rank update per row of the batch."""

    def __init__(self, rows: int, d_in: int, d_out: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rows, rank, d_in, device=device) / math.sqrt(d_in))
        self.up = nn.Parameter(torch.zeros(rows, d_out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.to(x.dtype).transpose(1, 2) @ self.up.to(x.dtype).transpose(1, 2)


class DocumentLora(nn.Module):
    """The adapters of a batch of documents: queries and values of every layer, and the output."""

    def __init__(self, shape: ModelSettings, rows: int, rank: int, device: torch.device) -> None:
        super().__init__()
        kv_dim = shape.dim // shape.heads * shape.kv_heads
        self.q = nn.ModuleList(BatchedLora(rows, shape.dim, shape.dim, rank, device) for _ in range(shape.layers))
        self.v = nn.ModuleList(BatchedLora(rows, shape.dim, kv_dim, rank, device) for _ in range(shape.layers))
        self.head = BatchedLora(rows, shape.dim, shape.vocab, rank, device)


class GatedAttention(nn.Module):
    """Grouped-query attention with a sparse gate: each head is scaled by a function of a few channels."""

    def __init__(self, shape: ModelSettings) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.dim // shape.heads
        self.gate_dims = shape.gate_dims
        kv_dim = self.kv_heads * self.head_dim
        self.q_proj = CastedLinear(shape.dim, shape.dim)
        self.k_proj = CastedLinear(shape.dim, kv_dim)
        self.v_proj = CastedLinear(shape.dim, kv_dim)
        self.out_proj = CastedLinear(shape.dim, shape.dim, zero_init=True)
        self.gate = nn.Parameter(torch.zeros(shape.heads, shape.gate_dims))
        self.q_gain = nn.Parameter(torch.full((shape.heads,), shape.qk_gain))
        self.rotary = Rotary(shape.rope_dims, shape.rope_base)

    def forward(self, x: Tensor, q_lora: BatchedLora | None, v_lora: BatchedLora | None) -> Tensor:
        rows, length, dim = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if q_lora is not None:
            q = q + q_lora(x)
        if v_lora is not None:
            v = v + v_lora(x)
        q = q.view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = self.rotary(rms_norm(q)), self.rotary(rms_norm(k))
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        gate = 2.0 * torch.sigmoid(F.linear(x[..., : self.gate_dims], self.gate.to(x.dtype)))
        y = y * gate.transpose(1, 2).unsqueeze(-1)
        return self.out_proj(y.transpose(1, 2).reshape(rows, length, dim))


class Mlp(nn.Module):
    """Leaky ReLU squared."""

    def __init__(self, shape: ModelSettings) -> None:
        super().__init__()
        self.up_proj = CastedLinear(shape.dim, shape.mlp_hidden)
        self.down_proj = CastedLinear(shape.mlp_hidden, shape.dim, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.leaky_relu(self.up_proj(x), 0.5).square())


class Block(nn.Module):
    def __init__(self, shape: ModelSettings, index: int) -> None:
        super().__init__()
        self.attn = GatedAttention(shape)
        self.mlp = Mlp(shape)
        self.attn_scale = nn.Parameter(torch.ones(shape.dim))
        self.mlp_scale = nn.Parameter(torch.ones(shape.dim))
        self.mix = nn.Parameter(torch.stack((torch.ones(shape.dim), torch.zeros(shape.dim))))
        self.depth_scale = 1.0 / math.sqrt(index + 1)

    def forward(self, x: Tensor, x0: Tensor, q_lora: BatchedLora | None, v_lora: BatchedLora | None) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn = self.attn(rms_norm(x) * self.depth_scale, q_lora, v_lora)
        x = x + self.attn_scale.to(x.dtype) * attn
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.depth_scale)


class Gpt(nn.Module):
    """The network. `hidden` gives the last hidden states, `logits` the capped scores of the vocabulary."""

    def __init__(self, shape: ModelSettings, bos: int) -> None:
        super().__init__()
        self.shape = shape
        self.bos = bos
        self.looped = False
        self.embed = nn.Embedding(shape.vocab, shape.dim)
        nn.init.normal_(self.embed.weight, std=shape.embed_std)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.layers))
        self.plain_order = list(range(shape.layers))
        again = list(range(shape.loop_first, shape.loop_last + 1))
        self.loop_order = [*range(shape.loop_last + 1), *again, *range(shape.loop_last + 1, shape.layers)]
        self.skip = nn.Parameter(torch.ones(len(self.loop_order) // 2, shape.dim))
        self.smear = nn.Parameter(torch.zeros(shape.gate_dims))
        self.smear_scale = nn.Parameter(torch.zeros(()))

    def smeared(self, ids: Tensor, x: Tensor) -> Tensor:
        """Mix a little of the previous token in, except into the first token of a document."""
        gate = torch.sigmoid(F.linear(x[:, 1:, : self.shape.gate_dims], self.smear.to(x.dtype)[None]))
        inside = (ids[:, 1:] != self.bos).unsqueeze(-1).to(x.dtype)
        mixed = x[:, 1:] + self.smear_scale.to(x.dtype) * gate * inside * x[:, :-1]
        return torch.cat((x[:, :1], mixed), dim=1)

    def hidden(self, ids: Tensor, lora: DocumentLora | None = None) -> Tensor:
        x = rms_norm(self.embed(ids).to(torch.bfloat16))
        x = self.smeared(ids, x)
        x0 = x
        order = self.loop_order if self.looped else self.plain_order
        half = len(order) // 2
        kept: list[Tensor] = []
        for step, layer in enumerate(order):
            if step >= len(order) - half:
                x = x + self.skip[step - (len(order) - half)].to(x.dtype) * kept.pop()
            q_lora = lora.q[layer] if lora is not None else None
            v_lora = lora.v[layer] if lora is not None else None
            x = self.blocks[layer](x, x0, q_lora, v_lora)
            if step < half:
                kept.append(x)
        return rms_norm(x)

    def logits(self, h: Tensor, lora: DocumentLora | None = None) -> Tensor:
        raw = F.linear(h, self.embed.weight.to(h.dtype))
        if lora is not None:
            raw = raw + lora.head(h)
        cap = self.shape.softcap
        return cap * torch.tanh(raw.float() / cap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        scores = self.logits(self.hidden(ids))
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    def matrices(self) -> dict[str, CastedLinear]:
        """The layers that Muon trains and GPTQ quantises."""
        return {name: m for name, m in self.named_modules() if isinstance(m, CastedLinear)}

# ==== optimisers

def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Approximate orthogonalisation of a matrix."""
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Each rank computes its share of the updates."""

    def __init__(self, params: Iterable[nn.Parameter], cluster: Cluster, lr: float, momentum: float, steps: int, wd: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "wd": wd})
        self.cluster = cluster

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16, device=self.cluster.device)
            at = 0
            for i, p in enumerate(params):
                if i % self.cluster.world == self.cluster.rank and p.grad is not None:
                    state = self.state[p]
                    if "velocity" not in state:
                        state["velocity"] = torch.zeros_like(p)
                    velocity = state["velocity"]
                    velocity.mul_(group["momentum"]).add_(p.grad)
                    update = newton_schulz(p.grad.add(velocity, alpha=group["momentum"]), group["steps"])
                    update = update * max(1.0, p.size(0) / p.size(1)) ** 0.5
                    flat[at : at + p.numel()] = update.reshape(-1)
                at += p.numel()
            self.cluster.sum_(flat)
            at = 0
            for p in params:
                p.mul_(1.0 - group["lr"] * group["wd"])
                p.add_(flat[at : at + p.numel()].view_as(p).to(p.dtype), alpha=-group["lr"])
                at += p.numel()


class OptimizerSet:
    """Muon for the matrices, AdamW for embeddings and for vectors, under one schedule."""

    def __init__(self, model: Gpt, cluster: Cluster, settings: TrainSettings) -> None:
        self.settings = settings
        self.params = list(model.parameters())
        matrices = [m.weight for m in model.matrices().values()]
        taken = {id(p) for p in matrices} | {id(model.embed.weight)}
        rest = [p for p in self.params if id(p) not in taken]
        betas = (settings.adam_beta1, settings.adam_beta2)
        self.muon = Muon(matrices, cluster, settings.matrix_lr, settings.muon_momentum, settings.muon_steps, settings.matrix_wd)
        self.adam = torch.optim.AdamW(
            [
                {"params": [model.embed.weight], "lr": settings.embed_lr, "weight_decay": settings.embed_wd},
                {"params": rest, "lr": settings.scalar_lr, "weight_decay": 0.0},
            ],
            betas=betas, eps=1e-8, fused=True,
        )
        self.groups = [*self.muon.param_groups, *self.adam.param_groups]
        self.base_lrs = [g["lr"] for g in self.groups]

    def step(self, scale: float) -> None:
        for group, lr in zip(self.groups, self.base_lrs):
            group["lr"] = lr * scale
        if self.settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.settings.clip_norm)
        self.muon.step()
        self.adam.step()
        self.zero()

    def zero(self) -> None:
        for p in self.params:
            p.grad = None

    def forget(self) -> None:
        """Drop all optimiser state, after the compile warm-up."""
        self.muon.state.clear()
        self.adam.state.clear()


class WeightAverage:
    """Exponential moving average of the weights, in fp32 on the GPU."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: t.detach().float().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, t in model.state_dict().items():
            self.shadow[name].lerp_(t.detach().float(), 1.0 - self.decay)

    def state(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.shadow.items()}

# ==== training

class Trainer:
    """Trains until the clock leaves only the reserve for calibration and quantisation."""

    def __init__(self, model: Gpt, cluster: Cluster, settings: Settings, val: ValidationSet, table: ByteTable, log: RunLog) -> None:
        self.model, self.cluster, self.val, self.table, self.log = model, cluster, val, table, log
        self.all, self.settings = settings, settings.train
        self.compiled = torch.compile(model, dynamic=False)
        self.optim = OptimizerSet(model, cluster, settings.train)
        self.accumulate = max(1, 8 // cluster.world)
        self.micro_tokens = settings.train.batch_tokens // self.accumulate
        self.loader = TrainLoader(settings.data.train_glob, cluster, settings.train.seq_len)
        self.ema = WeightAverage(model, settings.train.ema_decay)

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.accumulate):
            yield self.loader.batch(self.micro_tokens)

    def step(self, scale: float) -> Tensor:
        total = torch.zeros((), device=self.cluster.device)
        for inputs, targets in self.micro_batches():
            loss = self.compiled(inputs, targets) / self.accumulate
            loss.backward()
            total += loss.detach()
        self.cluster.average_grads(self.optim.params)
        self.optim.step(scale)
        return total

    def warm_up(self) -> None:
        """Compile both depths on random tokens, then put everything back."""
        kept = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        rows = self.micro_tokens // self.cluster.world // self.settings.seq_len
        for looped in (False, True):
            self.model.looped = looped
            for _ in range(self.settings.warmup_steps):
                noise = torch.randint(self.model.shape.vocab, (rows, self.settings.seq_len + 1), device=self.cluster.device)
                self.compiled(noise[:, :-1].contiguous(), noise[:, 1:].contiguous()).backward()
                self.cluster.average_grads(self.optim.params)
                self.optim.step(0.0)
        self.model.looped = False
        self.model.load_state_dict(kept)
        self.optim.forget()

    def lr_scale(self, progress: float) -> float:
        left = 1.0 - progress
        if left >= self.settings.warmdown:
            return 1.0
        return max(left / self.settings.warmdown, self.settings.min_lr)

    def run(self) -> Stopwatch:
        """Train; the clock that is returned runs on, for calibration and quantisation."""
        self.warm_up()
        self.cluster.barrier()
        clock = Stopwatch()
        limit = self.settings.wallclock - self.settings.reserve
        step, elapsed = 0, 0.0
        while step < self.settings.iterations and elapsed < limit:
            progress = max(elapsed / limit, step / self.settings.iterations)
            if progress >= self.settings.loop_from:
                self.model.looped = True
            loss = self.step(self.lr_scale(progress))
            self.ema.update(self.model)
            step += 1
            elapsed = self.cluster.from_main(clock.seconds())
            if step <= 5 or step % self.settings.log_every == 0:
                self.log(f"step:{step}/{self.settings.iterations} train_loss:{loss.item():.4f} train_time:{1000 * elapsed:.0f}ms")
            if self.settings.val_every and step % self.settings.val_every == 0:
                with clock.pause():
                    score = plain_eval(self.model, self.cluster, self.val, self.table, self.all.eval.seq_len)
                self.log(f"step:{step} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}")
        self.model.looped = True
        self.log(f"training stopped at step {step} train_time:{1000 * elapsed:.0f}ms")
        self.log("ema: applying the averaged weights")
        self.model.load_state_dict(self.ema.state())
        return clock

# ==== quantisation

@dataclass
class Statistics:
    """What calibration saw in front of one matrix."""

    hessian: Tensor
    magnitude: Tensor
    rows: int = 0


class Calibrator:
    """Collects input statistics of the matrices over training batches."""

    def __init__(self, model: Gpt, cluster: Cluster, settings: QuantSettings) -> None:
        self.model, self.cluster, self.settings = model, cluster, settings
        self.stats: dict[str, Statistics] = {}

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].size(-1)).float()
            stat = self.stats[name]
            stat.hessian.addmm_(x.T, x)
            stat.magnitude.add_(x.abs().sum(0))
            stat.rows += len(x)

        return note

    @torch.no_grad()
    def run(self, loader: TrainLoader) -> dict[str, Statistics]:
        handles = []
        for name, layer in self.model.matrices().items():
            width = layer.in_features
            zero = torch.zeros(width, width, device=self.cluster.device)
            self.stats[name] = Statistics(zero, torch.zeros(width, device=self.cluster.device))
            handles.append(layer.register_forward_pre_hook(self._hook(name)))
        for _ in range(self.settings.calib_batches):
            inputs, _ = loader.batch(self.settings.calib_tokens)
            self.model.hidden(inputs)
        for handle in handles:
            handle.remove()
        for stat in self.stats.values():
            self.cluster.sum_(stat.hessian)
            self.cluster.sum_(stat.magnitude)
            stat.hessian.div_(stat.rows * self.cluster.world)
            stat.magnitude.div_(stat.rows * self.cluster.world)
        return self.stats


def row_scales(w: Tensor, sigmas: float, top: int) -> Tensor:
    """One step size per row, from the spread of the row."""
    return (sigmas * w.std(dim=1) / top).clamp_min(1e-8).half().float()


def gptq(w: Tensor, hessian: Tensor, scale: Tensor, top: int, block: int, damp: float) -> Tensor:
    """Integers of a matrix; the error of each column is passed on to those that follow."""
    w, h = w.clone(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    q = torch.zeros_like(w)
    for low in range(0, w.size(1), block):
        high = min(low + block, w.size(1))
        part = w[:, low:high].clone()
        errors = torch.zeros_like(part)
        local = upper[low:high, low:high]
        for j in range(high - low):
            q[:, low + j] = (part[:, j] / scale).round().clamp(-top, top)
            error = (part[:, j] - q[:, low + j] * scale) / local[j, j]
            part[:, j + 1 :] -= torch.outer(error, local[j, j + 1 :])
            errors[:, j] = error
        w[:, high:] -= errors @ upper[low:high, high:]
    return q[:, torch.argsort(order)].to(torch.int8)


@dataclass
class QuantisedMatrix:
    """Integers, row scales, column scales (AWQ-lite) and, for some, the low-rank correction (LQER)."""

    ints: Tensor
    scale: Tensor
    columns: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def dense(self) -> Tensor:
        w = self.ints.float() * self.scale.float()[:, None] / self.columns.float()[None]
        if self.left is not None and self.right is not None:
            w = w + self.left.float() @ self.right.float()
        return w


class Quantiser:
    """AWQ-lite scaling, GPTQ, then LQER on the matrices with the largest weighted error."""

    def __init__(self, settings: QuantSettings, cluster: Cluster) -> None:
        self.settings = settings
        self.cluster = cluster

    def columns(self, stat: Statistics) -> Tensor:
        """Larger steps matter less for quiet input channels: stretch the loud ones before rounding."""
        s = (stat.magnitude / stat.magnitude.mean().clamp_min(1e-8)).clamp(0.1, 10.0) ** self.settings.awq_alpha
        return (s / s.log().mean().exp()).half().float()

    def matrix(self, w: Tensor, stat: Statistics) -> tuple[QuantisedMatrix, Tensor]:
        """The quantised matrix and the error that it leaves, weighted by the input magnitudes."""
        top = 2 ** (self.settings.bits - 1) - 1
        columns = self.columns(stat)
        stretched = w * columns[None]
        hessian = stat.hessian / columns[:, None] / columns[None]
        scale = row_scales(stretched, self.settings.clip_sigmas, top)
        ints = gptq(stretched, hessian, scale, top, self.settings.block, self.settings.damp)
        packed = QuantisedMatrix(ints, scale.half(), columns.half())
        error = (w - packed.dense()) * stat.magnitude.clamp_min(1e-6).sqrt()[None]
        return packed, error

    def embedding(self, w: Tensor) -> QuantisedMatrix:
        top = 2 ** (self.settings.embed_bits - 1) - 1
        scale = row_scales(w, self.settings.embed_clip_sigmas, top)
        ints = (w / scale[:, None]).round().clamp(-top, top).to(torch.int8)
        return QuantisedMatrix(ints, scale.half(), torch.ones(w.size(1), dtype=torch.float16, device=w.device))

    def correct(self, packed: QuantisedMatrix, error: Tensor, stat: Statistics) -> None:
        """Give a matrix the best low-rank approximation of its weighted error."""
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        r = self.settings.lqer_rank
        weight = stat.magnitude.clamp_min(1e-6).sqrt()
        packed.left = (u[:, :r] * s[:r].sqrt()).half()
        packed.right = (s[:r].sqrt()[:, None] * vh[:r] / weight[None]).half()

    @torch.no_grad()
    def run(self, model: Gpt, stats: dict[str, Statistics]) -> dict[str, QuantisedMatrix]:
        out: dict[str, QuantisedMatrix] = {}
        errors: dict[str, Tensor] = {}
        for name, layer in model.matrices().items():
            out[name], errors[name] = self.matrix(layer.weight.detach().float(), stats[name])
        worst = sorted(errors, key=lambda name: float(errors[name].norm()), reverse=True)
        for name in worst[: self.settings.lqer_top]:
            self.correct(out[name], errors[name], stats[name])
        out["embed"] = self.embedding(model.embed.weight.detach().float())
        return out

# ==== the artifact

def lrzip(raw: bytes, unpack: bool = False) -> bytes:
    """Run lrzip (zpaq back end) over a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        source.write_bytes(raw)
        mode = ["-d"] if unpack else ["-z", "-L", "9"]
        subprocess.run(["lrzip", "-q", *mode, "-o", str(target), str(source)], check=True)
        return target.read_bytes()


class GroupCodec:
    """Compresses a group with whatever is shortest for it."""

    @staticmethod
    def pack(raw: bytes) -> tuple[str, bytes]:
        tries = {"lzma": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
        if brotli is not None:
            tries["brotli"] = brotli.compress(raw, quality=11, lgwin=24)
        if shutil.which("lrzip"):
            tries["lrzip"] = lrzip(raw)
        best = min(tries, key=lambda name: len(tries[name]))
        return best, tries[best]

    @staticmethod
    def unpack(name: str, blob: bytes) -> bytes:
        if name == "brotli":
            return bytes(brotli.decompress(blob))
        if name == "lrzip":
            return lrzip(blob, unpack=True)
        return lzma.decompress(blob)


def group_of(name: str) -> str:
    """Tensors with like statistics go into one group."""
    if name.endswith((".scale", ".columns")):
        return "scales"
    if name.endswith((".left", ".right")):
        return "lqer"
    if name.endswith(".ints"):
        if name.startswith("embed"):
            return "embed"
        return "attn" if ".attn." in name else "mlp"
    return "control"


class Artifact:
    """The file format: a header in JSON, then the groups one after the other."""

    @staticmethod
    def write(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> int:
        groups: dict[str, list[bytes]] = {}
        index = []
        for name in sorted(tensors):
            array = tensors[name]
            turned = array.ndim == 2 and array.dtype == np.int8
            raw = np.ascontiguousarray(array.T if turned else array).tobytes()
            groups.setdefault(group_of(name), []).append(raw)
            index.append([name, group_of(name), str(array.dtype), list(array.shape), turned, len(raw)])
        packed = {name: GroupCodec.pack(b"".join(parts)) for name, parts in groups.items()}
        header = {"meta": meta, "index": index, "groups": [[n, c, len(b)] for n, (c, b) in packed.items()]}
        head = lzma.compress(json.dumps(header, separators=(",", ":")).encode())
        body = b"".join(blob for _, blob in packed.values())
        path.write_bytes(ARTIFACT_MAGIC + struct.pack("<I", len(head)) + head + body)
        return path.stat().st_size

    @staticmethod
    def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        file = io.BytesIO(path.read_bytes())
        if file.read(4) != ARTIFACT_MAGIC:
            raise ValueError(f"{path} is not an artifact")
        (size,) = struct.unpack("<I", file.read(4))
        header = json.loads(lzma.decompress(file.read(size)))
        groups = {name: io.BytesIO(GroupCodec.unpack(codec, file.read(n))) for name, codec, n in header["groups"]}
        tensors = {}
        for name, group, dtype, shape, turned, count in header["index"]:
            array = np.frombuffer(groups[group].read(count), dtype=dtype)
            tensors[name] = array.reshape(shape[::-1]).T.copy() if turned else array.reshape(shape).copy()
        return tensors, header["meta"]


def artifact_tensors(model: Gpt, packed: dict[str, QuantisedMatrix]) -> dict[str, np.ndarray]:
    """All arrays of the artifact: the quantised matrices, and the small parameters in fp16."""
    out: dict[str, np.ndarray] = {}
    for name, matrix in packed.items():
        for part in ("ints", "scale", "columns", "left", "right"):
            tensor = getattr(matrix, part)
            if tensor is not None:
                out[f"{name}.{part}"] = tensor.cpu().numpy()
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in packed:
            out[name] = tensor.detach().half().cpu().numpy()
    return out


def model_from_artifact(path: Path, shape: ModelSettings, bos: int, device: torch.device) -> tuple[Gpt, dict[str, Any]]:
    """The network as the artifact describes it."""
    arrays, meta = Artifact.read(path)
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        stem, _, part = name.rpartition(".")
        if part in ("ints", "scale", "columns", "left", "right"):
            parts.setdefault(stem, {})[part] = torch.from_numpy(array)
        else:
            state[name] = torch.from_numpy(array).float()
    for stem, tensors in parts.items():
        state[f"{stem}.weight"] = QuantisedMatrix(**tensors).dense()
    model = Gpt(shape, bos).to(device)
    model.load_state_dict(state)
    model.looped = True
    return model, meta

# ==== scores

@dataclass(frozen=True)
class Score:
    """Mean loss in nats per token, and bits per byte of the original text."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


class ScoreLedger:
    """Adds up losses, targets and bytes."""

    def __init__(self, cluster: Cluster, val: ValidationSet, table: ByteTable) -> None:
        self.cluster, self.val, self.table = cluster, val, table
        self.sums = torch.zeros(3, dtype=torch.float64, device=cluster.device)

    def sizes(self, positions: Tensor) -> Tensor:
        """Original bytes of the tokens at these positions of the stream."""
        if self.val.sidecar is not None:
            return self.val.sidecar[positions]
        return self.table.count(self.val.stream[positions - 1].long(), self.val.stream[positions].long())

    def record(self, positions: Tensor, nll: Tensor) -> None:
        self.sums[0] += nll.double().sum()
        self.sums[1] += positions.numel()
        self.sums[2] += self.sizes(positions).sum()

    def total(self) -> Score:
        nll, tokens, size = self.cluster.sum_(self.sums.clone()).tolist()
        return Score(nll / tokens, nll / math.log(2.0) / size, int(tokens), int(size))


def windows(stream: Tensor, starts: Tensor, length: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, positions of the targets, and which of them lie at or before `last`."""
    at = starts[:, None] + torch.arange(length, device=stream.device)[None]
    ids = stream[at.clamp_max(last)].long()
    targets = stream[(at + 1).clamp_max(last)].long()
    return ids, targets, at + 1, at < last


@torch.no_grad()
def plain_eval(model: Gpt, cluster: Cluster, val: ValidationSet, table: ByteTable, seq_len: int, rows: int = 16) -> Score:
    """The whole stream in adjoining windows, without adaptation. A cheap check, not the result."""
    ledger = ScoreLedger(cluster, val, table)
    starts = torch.arange(0, val.targets, seq_len, device=cluster.device)[cluster.rank :: cluster.world]
    for at in range(0, len(starts), rows):
        ids, targets, positions, live = windows(val.stream, starts[at : at + rows], seq_len, val.targets)
        scores = model.logits(model.hidden(ids))
        nll = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        ledger.record(positions[live], nll[live])
    return ledger.total()

# ==== hints

class ContinuationHints:
    """What followed the last time that the document had the same `order` tokens.

    The level says how often in a row that was right: 0 no hint, 1 once, 2 two or three times, 3 more.
    """

    LEVELS = 4
    GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)

    def __init__(self, order: int, vocab: int) -> None:
        self.order = order
        self.bits = (vocab - 1).bit_length()
        self.mask = (1 << self.bits * order) - 1

    @staticmethod
    def level(streak: int) -> int:
        return 1 if streak < 2 else 2 if streak < 4 else 3

    def follow(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Hint and level for each of tokens[1:]; the hint for a token is fixed before the token is read."""
        count = len(tokens) - 1
        hints = np.full(count, -1, dtype=np.int64)
        levels = np.zeros(count, dtype=np.int64)
        seen: dict[int, tuple[int, int]] = {}
        key = 0
        for i in range(count):
            key = (key << self.bits | tokens[i]) & self.mask
            if i + 1 < self.order:
                continue
            known = seen.get(key)
            if known is not None:
                hints[i] = known[0]
                levels[i] = self.level(known[1])
            follower = tokens[i + 1]
            streak = known[1] + 1 if known is not None and known[0] == follower else 1
            seen[key] = (follower, streak)
        return hints, levels


def tilted_nll(logits: Tensor, targets: Tensor, hints: Tensor, strength: Tensor) -> Tensor:
    """Loss under the tilted scores: the hinted token's score is raised, then softmax over the vocabulary."""
    lifted = logits.scatter_add(-1, hints.clamp_min(0).unsqueeze(-1), strength.unsqueeze(-1))
    return F.cross_entropy(lifted.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def fit_hints(model: Gpt, cluster: Cluster, settings: EvalSettings, loader: TrainLoader) -> list[float]:
    """Strength of the tilt for each level: the best of a grid on training documents."""
    tokens = loader.stream.take(settings.hint_fit_tokens)
    tokens = tokens[int(np.argmax(tokens == model.bos)) :]
    follower = ContinuationHints(settings.hint_order, model.shape.vocab)
    grid = torch.tensor(ContinuationHints.GRID, device=cluster.device)
    sums = torch.zeros(ContinuationHints.LEVELS, len(grid), dtype=torch.float64, device=cluster.device)
    for document in find_documents(tokens, model.bos)[cluster.rank :: cluster.world]:
        piece = tokens[document.start : document.start + min(len(document), settings.seq_len) + 1].astype(np.int64)
        hints, levels = (torch.from_numpy(a).to(cluster.device) for a in follower.follow(piece.tolist()))
        flat = torch.from_numpy(piece).to(cluster.device)
        logp = torch.log_softmax(model.logits(model.hidden(flat[None, :-1]))[0], dim=-1)
        nll = -logp.gather(-1, flat[1:, None])
        share = logp.gather(-1, hints.clamp_min(0)[:, None]).exp()
        hit = (hints == flat[1:])[:, None]
        losses = nll - grid * hit + torch.log1p(share * torch.expm1(grid))
        sums.index_add_(0, levels, losses.double())
    cluster.sum_(sums)
    return [0.0] + [float(grid[int(row.argmin())]) for row in sums[1:]]

# ==== phased, score-first test-time training

@dataclass(frozen=True)
class ChunkView:
    """One chunk of every document of a batch, with the context in front of it."""

    ids: Tensor  # (documents, context + chunk)
    offset: int  # length of the context
    targets: Tensor  # (documents, chunk)
    positions: Tensor  # of the targets, in the stream
    live: Tensor  # which targets belong to the document


class PhasedEvaluator:
    """Scores the documents in phases.

    Inside a phase every document starts from the same weights and has a LoRA of its own; a chunk is scored
    with the LoRA as the earlier chunks of the document left it, and then trains it. The documents of a phase
    do not see each other, so their order inside the phase is free and follows their length. After a phase the
    weights take SGD steps on its documents, all of them scored by then, and the next phase goes on from there.
    """

    def __init__(self, model: Gpt, cluster: Cluster, settings: EvalSettings, val: ValidationSet, table: ByteTable, strengths: list[float], clock: Stopwatch, log: RunLog) -> None:
        self.model, self.cluster, self.settings, self.val = model, cluster, settings, val
        self.clock, self.log = clock, log
        self.ledger = ScoreLedger(cluster, val, table)
        self.follower = ContinuationHints(settings.hint_order, model.shape.vocab)
        self.strengths = torch.tensor(strengths, device=cluster.device)
        self.skipped = 0

    def phases(self) -> list[tuple[int, int]]:
        """First and last document (exclusive) of each phase: the prefixes, then all others."""
        total = len(self.val.documents)
        prefix = min(self.settings.prefix_docs, total)
        cuts = [prefix * k // self.settings.phases for k in range(self.settings.phases + 1)]
        if cuts[-1] < total:
            cuts.append(total)
        return [(a, b) for a, b in zip(cuts, cuts[1:]) if b > a]

    def run(self) -> Score:
        spans = self.phases()
        for number, (first, last) in enumerate(spans):
            documents = self.val.documents[first:last]
            self.score(documents)
            if number + 1 < len(spans):
                self.learn(documents[0].start, documents[-1].stop)
            self.log(f"phase {number + 1}/{len(spans)}: documents {first}-{last - 1} time:{self.clock.seconds():.1f}s")
        return self.ledger.total()

    # ---- scoring

    def score(self, documents: Sequence[Document]) -> None:
        self.model.requires_grad_(False)
        ordered = sorted(documents, key=len)
        size = self.settings.batch_docs
        batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        for batch in batches[self.cluster.rank :: self.cluster.world]:
            self.score_batch(batch)

    def batch_hints(self, batch: Sequence[Document], width: int) -> tuple[Tensor, Tensor]:
        hints = np.full((len(batch), width), -1, dtype=np.int64)
        levels = np.zeros((len(batch), width), dtype=np.int64)
        for row, document in enumerate(batch):
            tokens = self.val.stream[document.start : document.stop + 1].tolist()
            hints[row, : len(document)], levels[row, : len(document)] = self.follower.follow(tokens)
        return torch.from_numpy(hints).to(self.cluster.device), torch.from_numpy(levels).to(self.cluster.device)

    def view(self, batch: Sequence[Document], number: int) -> ChunkView:
        device, chunk = self.cluster.device, self.settings.chunk
        starts = torch.tensor([d.start for d in batch], device=device)[:, None]
        stops = torch.tensor([d.stop for d in batch], device=device)[:, None]
        low = number * chunk
        begin = max(0, low + chunk - self.settings.seq_len)
        at = starts + torch.arange(begin, low + chunk, device=device)[None]
        ids = torch.where(at < stops, self.val.stream[at.clamp_max(self.val.targets)].long(), self.val.bos)
        positions = at[:, low - begin :] + 1
        live = positions <= stops
        targets = self.val.stream[positions.clamp_max(self.val.targets)].long()
        return ChunkView(ids, low - begin, targets, positions, live)

    def score_batch(self, batch: Sequence[Document]) -> None:
        cfg = self.settings
        lora = DocumentLora(self.model.shape, len(batch), cfg.lora_rank, self.cluster.device)
        optim = torch.optim.AdamW(lora.parameters(), lr=cfg.lora_lr, betas=(0.9, 0.95), weight_decay=cfg.lora_wd, fused=True)
        chunks = math.ceil(max(len(d) for d in batch) / cfg.chunk)
        hints, levels = self.batch_hints(batch, chunks * cfg.chunk)
        for number in range(chunks):
            view = self.view(batch, number)
            h = self.model.hidden(view.ids, lora)[:, view.offset :]
            logits = self.model.logits(h, lora)
            columns = slice(number * cfg.chunk, (number + 1) * cfg.chunk)
            with torch.no_grad():
                strength = self.strengths[levels[:, columns]]
                nll = tilted_nll(logits.detach(), view.targets, hints[:, columns], strength)
                self.ledger.record(view.positions[view.live], nll[view.live])
            if number + 1 < chunks:
                self.adapt(optim, logits, view)

    def adapt(self, optim: torch.optim.Optimizer, logits: Tensor, view: ChunkView) -> None:
        """One step of every document's LoRA on the chunk that was just scored."""
        if time.perf_counter() - self.clock.begin > self.settings.adapt_until:
            self.skipped += 1
            return
        loss = F.cross_entropy(logits.flatten(0, 1), view.targets.flatten(), reduction="none").view_as(view.targets)
        live = view.live.to(loss.dtype)
        per_document = (loss * live).sum(1) / live.sum(1).clamp_min(1.0)
        optim.zero_grad(set_to_none=True)
        per_document.sum().backward()
        optim.step()

    # ---- global steps

    def learn(self, first: int, last: int) -> None:
        """SGD on the targets first + 1 ... last of the stream, shared out among the ranks."""
        cfg, world = self.settings, self.cluster.world
        self.cluster.barrier()
        self.model.requires_grad_(True)
        params = list(self.model.parameters())
        optim = torch.optim.SGD(params, lr=cfg.sgd_lr, momentum=cfg.sgd_momentum)
        for p in params:
            p.grad = torch.zeros_like(p)
        starts = torch.arange(first, last, cfg.seq_len, device=self.cluster.device)
        size = cfg.sgd_batch_seqs * world
        for _ in range(cfg.sgd_epochs):
            for at in range(0, len(starts), size):
                group = starts[at : at + size]
                count = (last - group).clamp_max(cfg.seq_len).sum()
                mine = group[self.cluster.rank :: world]
                optim.zero_grad(set_to_none=False)
                if len(mine):
                    ids, targets, _, live = windows(self.val.stream, mine, cfg.seq_len, last)
                    scores = self.model.logits(self.model.hidden(ids))
                    nll = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
                    ((nll * live).sum() * world / count).backward()
                self.cluster.average_grads(params)
                torch.nn.utils.clip_grad_norm_(params, cfg.sgd_clip)
                optim.step()
        for p in params:
            p.grad = None
        self.model.requires_grad_(False)

    # ---- warm-up

    def warm_up(self) -> None:
        """Touch the kernels once, on random tokens and with an adapter that is thrown away."""
        cfg = self.settings
        lora = DocumentLora(self.model.shape, cfg.batch_docs, cfg.lora_rank, self.cluster.device)
        self.model.requires_grad_(False)
        for length in (cfg.chunk, cfg.seq_len):
            ids = torch.randint(self.model.shape.vocab, (cfg.batch_docs, length), device=self.cluster.device)
            scores = self.model.logits(self.model.hidden(ids, lora)[:, -cfg.chunk :], lora)
            F.cross_entropy(scores.flatten(0, 1), ids[:, -cfg.chunk :].flatten()).backward()
        del lora
        torch.cuda.empty_cache()

# ==== main

def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def report_size(artifact_bytes: int, log: RunLog) -> None:
    """Code plus artifact; raises when they do not fit."""
    code_bytes = len(Path(__file__).read_bytes())
    total = code_bytes + artifact_bytes
    log(f"artifact: {artifact_bytes} bytes, code: {code_bytes} bytes, total: {total} bytes")
    if total > SIZE_LIMIT:
        raise RuntimeError(f"submission has {total} bytes, {SIZE_LIMIT} are allowed")


@dataclass
class Workbench:
    """What both halves of the run need."""

    cluster: Cluster
    settings: Settings
    log: RunLog
    tokenizer: spm.SentencePieceProcessor
    table: ByteTable
    val: ValidationSet

    @classmethod
    def open(cls, cluster: Cluster, settings: Settings, log: RunLog) -> Workbench:
        tokenizer = spm.SentencePieceProcessor(model_file=settings.data.tokenizer)
        if tokenizer.get_piece_size() != settings.model.vocab:
            raise ValueError(f"tokenizer has {tokenizer.get_piece_size()} pieces, the model {settings.model.vocab}")
        table = ByteTable.from_tokenizer(tokenizer, cluster.device)
        val = ValidationSet.load(settings.data, tokenizer.bos_id(), cluster.device)
        log(f"validation: {len(val.documents)} documents, {val.targets} targets, bytes from the {settings.data.byte_source}")
        return cls(cluster, settings, log, tokenizer, table, val)


def build(bench: Workbench) -> None:
    """Train, calibrate, quantise, write the artifact."""
    cluster, settings, log = bench.cluster, bench.settings, bench.log
    model = Gpt(settings.model, bench.val.bos).to(cluster.device)
    log(f"parameters: {sum(p.numel() for p in model.parameters())}")
    trainer = Trainer(model, cluster, settings, bench.val, bench.table, log)
    clock = trainer.run()

    stats = Calibrator(model, cluster, settings.quant).run(trainer.loader)
    strengths = fit_hints(model, cluster, settings.eval, trainer.loader)
    log(f"calibration on training shards done at {clock.seconds():.1f}s, hint strengths {strengths}")
    packed = Quantiser(settings.quant, cluster).run(model, stats)
    log(f"train+calibration+quantisation: {clock.seconds():.1f}s of {settings.train.wallclock:.0f}s")

    if cluster.main:
        meta = {"strengths": strengths, "shape": asdict(settings.model)}
        size = Artifact.write(Path(settings.quant.artifact), artifact_tensors(model, packed), meta)
        report_size(size, log)
    cluster.barrier()


def evaluate(bench: Workbench) -> None:
    """Read the artifact back and score the validation documents."""
    cluster, settings, log = bench.cluster, bench.settings, bench.log
    clock = Stopwatch()
    model, meta = model_from_artifact(Path(settings.quant.artifact), settings.model, bench.val.bos, cluster.device)
    model.eval()
    if settings.eval.plain_eval:
        plain = plain_eval(model, cluster, bench.val, bench.table, settings.eval.seq_len)
        log(f"diagnostic quantized_plain val_loss:{plain.loss:.6f} val_bpb:{plain.bpb:.6f} time:{clock.seconds():.1f}s")
    evaluator = PhasedEvaluator(model, cluster, settings.eval, bench.val, bench.table, meta["strengths"], clock, log)
    evaluator.warm_up()
    score = evaluator.run()
    seconds = clock.seconds()
    log(f"scored {score.tokens} of {bench.val.targets} targets, {score.bytes} bytes, LoRA steps skipped on rank 0: {evaluator.skipped}")
    log(f"eval_time:{seconds:.1f}s of {settings.eval.budget:.0f}s")
    log(f"final_phased_ttt val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    if cluster.main:
        result = {"val_loss": score.loss, "val_bpb": score.bpb, "eval_seconds": seconds, "seed": settings.train.seed}
        Path("results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["prepare"]:
        prepare(sys.argv[2:])
        return
    settings = Settings()
    cluster = Cluster.start()
    log = RunLog(cluster, settings.train.run_id)
    seed_everything(settings.train.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    log(f"torch {torch.__version__} world:{cluster.world}")
    log(json.dumps(asdict(settings)))
    bench = Workbench.open(cluster, settings, log)
    if not settings.eval.eval_only:
        build(bench)
        torch.cuda.empty_cache()
    evaluate(bench)
    cluster.stop()


if __name__ == "__main__":
    main()
