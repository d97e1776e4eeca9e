"""Training and evaluation of a compact language model under a 16 MB artifact limit.

The script is organised as a sequence of offices, each of which does one thing and hands its result to the next:

    ShardReader -> Trainer (with a WeightAverager) -> Calibrator -> Quantizer -> Archive -> Evaluators

The final evaluation walks through the validation stream once, chunk by chunk.  For each chunk the probability of every
token is the mixture of the network and of an n-gram cache, both of which know only chunks that came before; once the
losses of the chunk are entered in the ledger, the cache counts the chunk and the network takes a few gradient steps.
"""

import contextlib
import copy
import glob
import hashlib
import io
import logging
import math
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy
import sentencepiece
import torch
import torch.distributed
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    import zstandard
except ImportError:
    zstandard = None
import lzma

logger = logging.getLogger("bureau")


# ======================================================================================================================
# Settings
# ======================================================================================================================


@dataclass(frozen=True)
class Settings:
    """Every setting may be overridden by the environment variable of the same name in capitals."""

    # Data
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    run_id: str = "bureau"
    seed: int = 2024

    # Model
    vocab_size: int = 1024
    model_dim: int = 512
    num_layers: int = 10
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_multiplier: int = 3
    rope_base: float = 50000.0
    logit_softcap: float = 30.0

    # Optimisation
    iterations: int = 20000
    max_wallclock_seconds: float = 600.0
    reserve_seconds: float = 16.0
    train_batch_tokens: int = 524288
    train_seq_len: int = 1024
    warmdown_fraction: float = 0.5
    warmup_steps: int = 10
    matrix_lr: float = 0.03
    embedding_lr: float = 0.04
    scalar_lr: float = 0.02
    muon_momentum: float = 0.95
    newton_schulz_steps: int = 5
    weight_decay: float = 0.03
    gradient_clip: float = 1.0
    validate_every: int = 2000
    log_every: int = 200

    # Averaging of weights over the warm-down
    average_every: int = 40
    average_from: float = 0.6

    # Quantisation
    weight_bits: int = 6
    embedding_bits: int = 8
    calibration_batches: int = 32
    damping: float = 0.012
    clip_deviations: float = 10.5

    # Evaluation
    eval_seq_len: int = 1024
    eval_stride: int = 64
    eval_batch: int = 32
    temperature: float = 1.0
    adaptation: bool = True
    adaptation_lr: float = 0.0015
    adaptation_momentum: float = 0.9
    adaptation_epochs: int = 2
    adaptation_chunk: int = 65536
    adaptation_batch: int = 16
    cache: bool = True
    cache_order: int = 3
    cache_rows: int = 65536
    cache_weight: float = 0.25
    cache_half: float = 12.0
    cache_prior: float = 0.02

    @classmethod
    def from_environment(cls) -> "Settings":
        chosen: dict[str, object] = {}
        for entry in fields(cls):
            raw = os.environ.get(entry.name.upper())
            if raw is None:
                continue
            if entry.type is bool:
                chosen[entry.name] = raw.strip().lower() in ("1", "true", "yes", "on")
            else:
                chosen[entry.name] = entry.type(raw)
        return cls(**chosen)

    @property
    def train_pattern(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def validation_pattern(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")


@dataclass(frozen=True)
class Cluster:
    """This process's place among all processes."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls) -> "Cluster":
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        if world_size > 1:
            torch.distributed.init_process_group(backend="nccl", device_id=device)
        return cls(rank, world_size, device)

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
        return tensor

    def average(self, parameters: list[nn.Parameter]) -> None:
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad, op=torch.distributed.ReduceOp.AVG)

    def wait(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def share_of(self, count: int) -> range:
        """This rank's part of `count` consecutive things."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


class Stopwatch:
    """Counts seconds only between start() and stop()."""

    def __init__(self) -> None:
        self.counted = 0.0
        self.started: float | None = None

    def start(self) -> "Stopwatch":
        torch.cuda.synchronize()
        self.started = time.perf_counter()
        return self

    def stop(self) -> float:
        self.counted = self.seconds
        self.started = None
        return self.counted

    @property
    def seconds(self) -> float:
        if self.started is None:
            return self.counted
        torch.cuda.synchronize()
        return self.counted + time.perf_counter() - self.started

    @property
    def milliseconds(self) -> int:
        return round(1000 * self.seconds)


def set_up_logging(settings: Settings, cluster: Cluster) -> None:
    logger.setLevel(logging.INFO if cluster.is_leader else logging.ERROR)
    pathlib.Path("logs").mkdir(exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if cluster.is_leader:
        handlers.append(logging.FileHandler(f"logs/{settings.run_id}_{settings.seed}.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


# ======================================================================================================================
# Bytes
# ======================================================================================================================


class ByteAccountant:
    """Knows how many bytes of the original text a token stands for, given the token before it."""

    MARK = "\u2581"

    def __init__(self, settings: Settings, device: torch.device) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=settings.tokenizer_path)
        if processor.vocab_size() != settings.vocab_size:
            raise ValueError(f"the tokenizer has {processor.vocab_size()} pieces, VOCAB_SIZE is {settings.vocab_size}")
        own, space, special = [], [], []
        for token in range(settings.vocab_size):
            is_special = processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token)
            piece = "" if is_special else processor.id_to_piece(token)
            special.append(is_special)
            space.append(piece.startswith(self.MARK))
            if processor.is_byte(token):
                own.append(1)
            else:
                own.append(len(piece.removeprefix(self.MARK).encode("utf-8")))
        self._own = torch.tensor(own, dtype=torch.float64, device=device)
        self._space = torch.tensor(space, dtype=torch.bool, device=device)
        self._special = torch.tensor(special, dtype=torch.bool, device=device)

    def count(self, before: Tensor, tokens: Tensor) -> Tensor:
        """The bytes of each token: its own, and one for the space in front unless the text begins there."""
        space = self._space[tokens] & ~self._special[before]
        return self._own[tokens] + space.double()


# ======================================================================================================================
# Data
# ======================================================================================================================


class ShardReader:
    """Reads `.bin` shards: 256 little-endian int32 of header (magic, version, count), then uint16 tokens."""

    MAGIC = 20240520
    HEADER_BYTES = 1024

    def __init__(self, pattern: str) -> None:
        self.paths = [pathlib.Path(name) for name in sorted(glob.glob(pattern))]
        if not self.paths:
            raise FileNotFoundError(f"no shard matches {pattern}")

    def read(self, path: pathlib.Path) -> Tensor:
        with path.open("rb") as file:
            header = numpy.frombuffer(file.read(self.HEADER_BYTES), dtype="<i4")
            if header[0] != self.MAGIC or header[1] != 1:
                raise ValueError(f"{path} is not a shard of version 1")
            tokens = numpy.frombuffer(file.read(), dtype="<u2")
        if tokens.size != header[2]:
            raise ValueError(f"{path} holds {tokens.size} tokens and announces {header[2]}")
        return torch.from_numpy(tokens.astype(numpy.int32))

    def everything(self) -> Tensor:
        return torch.cat([self.read(path) for path in self.paths])

    def endlessly(self) -> Iterator[Tensor]:
        while True:
            for path in self.paths:
                yield self.read(path)


class BatchSource:
    """Batches for one rank, cut from the shards in order."""

    def __init__(self, reader: ShardReader, settings: Settings, cluster: Cluster) -> None:
        self._shards = reader.endlessly()
        self._length = settings.train_seq_len
        self._rows = settings.train_batch_tokens // (settings.train_seq_len * cluster.world_size)
        self._cluster = cluster
        self._left = next(self._shards)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        per_rank = self._rows * self._length
        needed = per_rank * self._cluster.world_size + 1
        while self._left.numel() < needed:
            self._left = torch.cat((self._left, next(self._shards)))
        begin = per_rank * self._cluster.rank
        mine = self._left[begin : begin + per_rank + 1].to(self._cluster.device, torch.int64)
        self._left = self._left[needed - 1 :]
        return mine[:-1].view(self._rows, self._length), mine[1:].view(self._rows, self._length)


# ======================================================================================================================
# Model
# ======================================================================================================================


def normalised(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.size(-1),))


class Projection(nn.Linear):
    """A linear map without bias, stored in float32 and applied in the type of its input."""

    def __init__(self, inputs: int, outputs: int, starts_at_zero: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        if starts_at_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class RotaryPositions(nn.Module):
    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(-2), device=x.device, dtype=torch.float32)
        angle = torch.outer(positions, self.frequencies)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class GroupedAttention(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads = settings.num_heads, settings.num_kv_heads
        self.head_dim = settings.model_dim // settings.num_heads
        self.query = Projection(settings.model_dim, self.heads * self.head_dim)
        self.key = Projection(settings.model_dim, self.kv_heads * self.head_dim)
        self.value = Projection(settings.model_dim, self.kv_heads * self.head_dim)
        self.output = Projection(self.heads * self.head_dim, settings.model_dim, starts_at_zero=True)
        self.sharpness = nn.Parameter(torch.full((self.heads, 1, 1), 1.4))
        self.rotary = RotaryPositions(self.head_dim, settings.rope_base)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query = self.rotary(normalised(self._split(self.query(x), self.heads)))
        key = self.rotary(normalised(self._split(self.key(x), self.kv_heads)))
        value = self._split(self.value(x), self.kv_heads)
        query = query * self.sharpness.to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden = settings.model_dim * settings.mlp_multiplier
        self.widen = Projection(settings.model_dim, hidden)
        self.narrow = Projection(hidden, settings.model_dim, starts_at_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(functional.relu(self.widen(x)).square())


class TransformerBlock(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention = GroupedAttention(settings)
        self.feed_forward = FeedForward(settings)
        self.attention_scale = nn.Parameter(torch.ones(settings.model_dim))
        self.feed_forward_scale = nn.Parameter(torch.ones(settings.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_scale.to(x.dtype) * self.attention(normalised(x))
        return x + self.feed_forward_scale.to(x.dtype) * self.feed_forward(normalised(x))


class LanguageModel(nn.Module):
    """A U-shaped transformer: the second half of the blocks also sees the outputs of the first half, mirrored."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.softcap = settings.logit_softcap
        self.embedding = nn.Embedding(settings.vocab_size, settings.model_dim)
        nn.init.normal_(self.embedding.weight, std=0.01)
        self.blocks = nn.ModuleList([TransformerBlock(settings) for _ in range(settings.num_layers)])
        self.skip_scales = nn.Parameter(torch.ones(settings.num_layers // 2, settings.model_dim))

    def logits(self, tokens: Tensor) -> Tensor:
        x = normalised(self.embedding(tokens).bfloat16())
        half = len(self.blocks) // 2
        kept: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number >= half and kept:
                x = x + self.skip_scales[number - half].to(x.dtype) * kept.pop()
            x = block(x)
            if number < half:
                kept.append(x)
        x = normalised(x)
        raw = functional.linear(x, self.embedding.weight.to(x.dtype)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


# ======================================================================================================================
# Optimisers
# ======================================================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near an orthogonal matrix by Newton-Schulz iteration."""

    def __init__(self, parameters: list[nn.Parameter], settings: Settings) -> None:
        defaults = dict(lr=settings.matrix_lr, momentum=settings.muon_momentum, decay=settings.weight_decay)
        super().__init__(parameters, defaults)
        self.iterations = settings.newton_schulz_steps

    def _orthogonalised(self, update: Tensor) -> Tensor:
        x = update.bfloat16()
        transposed = x.size(0) > x.size(1)
        if transposed:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(self.iterations):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if transposed else x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                update = parameter.grad + group["momentum"] * state["momentum"]
                update = self._orthogonalised(update) * max(1.0, update.size(0) / update.size(1)) ** 0.5
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def make_optimisers(model: LanguageModel, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    scalars = [p for p in model.blocks.parameters() if p.ndim != 2] + [model.skip_scales]
    groups = [
        {"params": [model.embedding.weight], "lr": settings.embedding_lr},
        {"params": scalars, "lr": settings.scalar_lr},
    ]
    optimisers = [Muon(matrices, settings), torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


# ======================================================================================================================
# Scores
# ======================================================================================================================


class Score(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    tokens: int

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bits_per_byte:.4f}"

    def exactly(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bits_per_byte:.8f}"


class Ledger:
    """Sums of what was scored.  Entries are never changed or taken back."""

    def __init__(self, accountant: ByteAccountant, cluster: Cluster) -> None:
        self._accountant = accountant
        self._cluster = cluster
        self._nats = torch.zeros((), dtype=torch.float64, device=cluster.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=cluster.device)
        self._bytes = torch.zeros((), dtype=torch.float64, device=cluster.device)

    def enter(self, losses: Tensor, before: Tensor, targets: Tensor) -> None:
        """All three flat and of one length: one entry per scored token."""
        self._nats += losses.double().sum()
        self._tokens += targets.numel()
        self._bytes += self._accountant.count(before, targets).sum()

    def close(self) -> Score:
        nats, tokens, size = self._cluster.add_up(torch.stack((self._nats, self._tokens, self._bytes))).tolist()
        return Score(nats / tokens, nats / math.log(2.0) / size, int(tokens))


class Window(NamedTuple):
    """Inputs begin .. end - 1; the targets of inputs first .. end - 1 are scored."""

    begin: int
    first: int
    end: int


def windows_between(first: int, last: int, settings: Settings) -> list[Window]:
    """Windows whose scored parts lie side by side and together are first .. last - 1."""
    made = []
    for start in range(first, last, settings.eval_stride):
        end = min(start + settings.eval_stride, last)
        made.append(Window(max(0, end - settings.eval_seq_len), start, end))
    return made


# ======================================================================================================================
# The cache
# ======================================================================================================================


class NgramCache:
    """Counts of what followed the last few tokens, so far.

    A context is hashed to one row; a row holds one count per token of the vocabulary.  What the cache predicts is the
    row plus a prior, divided by the sum of both: a distribution over the vocabulary, whatever contexts share a row.
    How much it is trusted depends on how much the row has seen, never on the token to be predicted.
    """

    MULTIPLIERS = (1, 1_000_003, 998_244_353, 402_653_189, 805_306_457)

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._order = settings.cache_order
        self._rows = settings.cache_rows
        self._weight = settings.cache_weight
        self._half = settings.cache_half
        self._prior = settings.cache_prior
        self._counts = torch.zeros(settings.cache_rows, settings.vocab_size, dtype=torch.float32, device=device)

    def rows_for(self, tokens: Tensor) -> Tensor:
        """For each place of a stream of inputs (.., length) the row of the context that ends there."""
        key = torch.zeros_like(tokens)
        for back in range(self._order):
            shifted = functional.pad(tokens, (back, 0))[..., : tokens.size(-1)]
            key = key ^ ((shifted + 1) * self.MULTIPLIERS[back])
        return key % self._rows

    def mixed(self, log_probabilities: Tensor, rows: Tensor) -> Tensor:
        """Log of the mixture. log_probabilities (n, vocabulary), rows (n,)."""
        counts = self._counts[rows].float()
        seen = counts.sum(dim=-1, keepdim=True)
        prior = self._prior
        cached = (counts + prior) / (seen + prior * counts.size(-1))
        trust = self._weight * seen / (seen + self._half)
        return torch.log((1 - trust) * log_probabilities.exp() + trust * cached)

    def learn(self, tokens: Tensor) -> None:
        """Counts a piece of the stream that has been scored; its first `order` tokens serve as context only."""
        rows = self.rows_for(tokens[:-1])[self._order - 1 :]
        followers = tokens[self._order :]
        one = torch.ones(followers.numel(), dtype=self._counts.dtype, device=self._counts.device)
        self._counts.index_put_((rows, followers), one, accumulate=True)


# ======================================================================================================================
# Evaluators
# ======================================================================================================================


class Evaluator:
    """The parts that all evaluators share: where the validation tokens lie, and how windows become batches."""

    def __init__(self, settings: Settings, cluster: Cluster, accountant: ByteAccountant, tokens: Tensor) -> None:
        self.settings = settings
        self.cluster = cluster
        self.accountant = accountant
        self.tokens = tokens

    @property
    def targets(self) -> int:
        return self.tokens.numel() - 1

    def batches(self, windows: list[Window]) -> Iterator[tuple[list[Window], Tensor, Tensor]]:
        size = self.settings.eval_batch
        for at in range(0, len(windows), size):
            group = windows[at : at + size]
            inputs = torch.zeros(len(group), self.settings.eval_seq_len, dtype=torch.int64)
            targets = torch.zeros_like(inputs)
            for row, window in enumerate(group):
                length = window.end - window.begin
                inputs[row, :length] = self.tokens[window.begin : window.end]
                targets[row, :length] = self.tokens[window.begin + 1 : window.end + 1]
            yield group, inputs.to(self.cluster.device), targets.to(self.cluster.device)

    def score_windows(
        self, model: LanguageModel, windows: list[Window], ledger: Ledger, cache: NgramCache | None = None
    ) -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for group, inputs, targets in self.batches(windows):
                logits = model.logits(inputs).float() / self.settings.temperature
                log_probabilities = torch.log_softmax(logits, dim=-1)
                for row, window in enumerate(group):
                    part = slice(window.first - window.begin, window.end - window.begin)
                    predicted = log_probabilities[row, part]
                    if cache is not None:
                        predicted = cache.mixed(predicted, cache.rows_for(inputs[row])[part])
                    goal = targets[row, part]
                    losses = -predicted.gather(1, goal[:, None])[:, 0]
                    ledger.enter(losses, inputs[row, part], goal)

    def checked(self, ledger: Ledger) -> Score:
        score = ledger.close()
        if score.tokens != self.targets:
            raise RuntimeError(f"{score.tokens} tokens were scored, the validation stream has {self.targets}")
        return score


class QuickEvaluator(Evaluator):
    """Windows side by side, without overlap: for looking on while training."""

    def run(self, model: nn.Module) -> Score:
        ledger = Ledger(self.accountant, self.cluster)
        length = self.settings.eval_seq_len
        edges = [(a, min(a + length, self.targets)) for a in range(0, self.targets, length)]
        mine = [Window(a, a, z) for a, z in (edges[i] for i in self.cluster.share_of(len(edges)))]
        self.score_windows(model, mine, ledger)
        return self.checked(ledger)


class SlidingEvaluator(Evaluator):
    """Windows that advance by a stride: a fixed predictor with a long context."""

    def run(self, model: nn.Module) -> Score:
        ledger = Ledger(self.accountant, self.cluster)
        windows = windows_between(0, self.targets, self.settings)
        self.score_windows(model, [windows[i] for i in self.cluster.share_of(len(windows))], ledger)
        return self.checked(ledger)


class AdaptiveEvaluator(Evaluator):
    """One walk through the stream: score a chunk, then let cache and weights learn from it."""

    def run(self, model: LanguageModel) -> Score:
        settings = self.settings
        ledger = Ledger(self.accountant, self.cluster)
        cache = NgramCache(settings, self.cluster.device) if settings.cache else None
        optimiser = torch.optim.SGD(
            model.parameters(), lr=settings.adaptation_lr, momentum=settings.adaptation_momentum
        )
        edges = list(range(0, self.targets, settings.adaptation_chunk)) + [self.targets]
        for number, (first, last) in enumerate(zip(edges, edges[1:])):
            windows = windows_between(first, last, settings)
            self.score_windows(model, [windows[i] for i in self.cluster.share_of(len(windows))], ledger, cache)
            self.cluster.wait()
            if cache is not None:
                cache.learn(self.tokens[max(0, first - settings.cache_order + 1) : last + 1].to(self.cluster.device).long())
            if settings.adaptation and last < self.targets:
                self._adapt(model, optimiser, first, last)
            if number % 100 == 0:
                logger.info(f"  chunk {number + 1}/{len(edges) - 1} done")
        return self.checked(ledger)

    def _adapt(self, model: LanguageModel, optimiser: torch.optim.Optimizer, first: int, last: int) -> None:
        """A few epochs over the sequences that lie wholly in first .. last; every rank takes its share."""
        length = self.settings.eval_seq_len
        starts = list(range(first, last - length + 1, length))
        mine = [starts[i] for i in self.cluster.share_of(len(starts))]
        remaining = 1 - first / self.targets
        for group in optimiser.param_groups:
            group["lr"] = self.settings.adaptation_lr * remaining
        model.train()
        for _ in range(self.settings.adaptation_epochs):
            for at in range(0, len(mine), self.settings.adaptation_batch):
                rows = torch.stack([self.tokens[s : s + length + 1] for s in mine[at : at + self.settings.adaptation_batch]])
                rows = rows.to(self.cluster.device).long()
                optimiser.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(rows[:, :-1], rows[:, 1:])
                loss.backward()
                self.cluster.average(list(model.parameters()))
                nn.utils.clip_grad_norm_(model.parameters(), self.settings.gradient_clip)
                optimiser.step()


# ======================================================================================================================
# Training
# ======================================================================================================================


class WeightAverager:
    """The mean of snapshots taken at regular steps late in training."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.snapshots = 0

    def take(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            value = tensor.detach().double()
            self._sums[name] = self._sums[name] + value if self.snapshots else value.clone()
        self.snapshots += 1

    def give(self, model: nn.Module) -> None:
        if self.snapshots == 0:
            return
        like = model.state_dict()
        model.load_state_dict({name: (total / self.snapshots).to(like[name].dtype) for name, total in self._sums.items()})


class Trainer:
    def __init__(self, settings: Settings, cluster: Cluster, onlooker: QuickEvaluator) -> None:
        self.settings = settings
        self.cluster = cluster
        self.onlooker = onlooker
        self.watch = Stopwatch()
        self.model = LanguageModel(settings).to(cluster.device)
        compiled = torch.compile(self.model)
        self.replica = (
            DistributedDataParallel(compiled, device_ids=[cluster.device.index]) if cluster.world_size > 1 else compiled
        )
        self.optimisers = make_optimisers(self.model, settings)
        self.averager = WeightAverager()

    @property
    def seconds_for_steps(self) -> float:
        return self.settings.max_wallclock_seconds - self.settings.reserve_seconds

    def progress(self) -> float:
        return min(self.watch.seconds / self.seconds_for_steps, 1.0)

    def out_of_time(self) -> bool:
        mine = torch.tensor(float(self.watch.seconds >= self.seconds_for_steps), device=self.cluster.device)
        return self.cluster.add_up(mine).item() > 0

    def one_step(self, source: BatchSource) -> float:
        inputs, targets = source.next_batch()
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.replica(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.item()

    def set_learning_rates(self) -> None:
        left = 1 - self.progress()
        factor = min(1.0, left / self.settings.warmdown_fraction)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor

    def warm_up(self) -> None:
        """Compiles everything on a few training batches, then puts weights and optimisers back."""
        weights = copy.deepcopy(self.model.state_dict())
        states = [copy.deepcopy(optimiser.state_dict()) for optimiser in self.optimisers]
        source = BatchSource(ShardReader(self.settings.train_pattern), self.settings, self.cluster)
        for _ in range(self.settings.warmup_steps):
            self.one_step(source)
        self.model.load_state_dict(weights)
        for optimiser, state in zip(self.optimisers, states):
            optimiser.load_state_dict(state)

    def look(self, step: int) -> None:
        self.watch.stop()
        score = self.onlooker.run(self.model)
        self.model.train()
        mean = self.watch.milliseconds / max(step, 1)
        logger.info(
            f"step:{step}/{self.settings.iterations} {score} train_time:{self.watch.milliseconds}ms step_avg:{mean:.2f}ms"
        )
        self.watch.start()

    def run(self) -> LanguageModel:
        settings = self.settings
        self.warm_up()
        source = BatchSource(ShardReader(settings.train_pattern), settings, self.cluster)
        self.watch.start()
        step = 0
        while step < settings.iterations and not self.out_of_time():
            if settings.validate_every and step % settings.validate_every == 0:
                self.look(step)
            self.set_learning_rates()
            loss = self.one_step(source)
            step += 1
            if self.progress() >= settings.average_from and step % settings.average_every == 0:
                self.averager.take(self.model)
            if step % settings.log_every == 0:
                logger.info(f"step:{step}/{settings.iterations} train_loss:{loss:.4f} train_time:{self.watch.milliseconds}ms")
        self.look(step)
        logger.info(f"swa: mean of {self.averager.snapshots} snapshots")
        self.averager.give(self.model)
        return self.model


# ======================================================================================================================
# Quantisation
# ======================================================================================================================


class Calibrator:
    """Second moments of the inputs of each projection, over training batches."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self.settings = settings
        self.cluster = cluster
        self.moments: dict[str, Tensor] = {}

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            product = (rows.T @ rows).float()
            self.moments[name] = self.moments[name] + product if name in self.moments else product

        return watch

    def run(self, model: LanguageModel) -> dict[str, Tensor]:
        source = BatchSource(ShardReader(self.settings.train_pattern), self.settings, self.cluster)
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                if isinstance(module, Projection):
                    stack.callback(module.register_forward_hook(self._watcher(f"{name}.weight")).remove)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(self.settings.calibration_batches):
                    inputs, _ = source.next_batch()
                    model.logits(inputs)
        return {name: self.cluster.add_up(moment) for name, moment in self.moments.items()}


class Quantizer:
    BLOCK = 128

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def nearest(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        top = 2 ** (bits - 1) - 1
        scale = (weight.abs().amax(dim=1).clamp_min(1e-8) / top).half()
        return torch.round(weight / scale.float()[:, None]).clamp(-top, top).to(torch.int8), scale

    def compensated(self, weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """GPTQ: columns in order, each column's rounding error is spread over the columns still to come."""
        weight, moment = weight.float().clone(), moment.float().clone()
        top = 2 ** (self.settings.weight_bits - 1) - 1
        moment.diagonal().add_(self.settings.damping * moment.diagonal().mean() + 1e-8)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        upper = torch.linalg.cholesky(inverse, upper=True)
        scale = (self.settings.clip_deviations * weight.std(dim=1) / top).clamp_min(1e-8).half()
        codes = torch.zeros_like(weight)
        columns = weight.size(1)
        for begin in range(0, columns, self.BLOCK):
            end = min(begin + self.BLOCK, columns)
            errors = torch.zeros(weight.size(0), end - begin, device=weight.device)
            for column in range(begin, end):
                codes[:, column] = torch.round(weight[:, column] / scale.float()).clamp(-top, top)
                error = (weight[:, column] - codes[:, column] * scale.float()) / upper[column, column]
                weight[:, column:end] -= torch.outer(error, upper[column, column:end])
                errors[:, column - begin] = error
            weight[:, end:] -= errors @ upper[begin:end, end:]
        return codes.to(torch.int8), scale

    def run(self, model: LanguageModel, moments: dict[str, Tensor]) -> dict[str, object]:
        box: dict[str, object] = {}
        for name, tensor in model.state_dict().items():
            if name in moments:
                box[name] = tuple(part.cpu() for part in self.compensated(tensor, moments[name]))
            elif tensor.ndim == 2:
                box[name] = tuple(part.cpu() for part in self.nearest(tensor.float(), self.settings.embedding_bits))
            else:
                box[name] = tensor.half().cpu()
        return box

    @staticmethod
    def restored(box: dict[str, object]) -> dict[str, Tensor]:
        def widened(value: object) -> Tensor:
            if isinstance(value, tuple):
                codes, scale = value
                return codes.float() * scale.float()[:, None]
            return value.float()

        return {name: widened(value) for name, value in box.items()}


class Archive:
    """The artifact: one compressed file, and the sum of its bytes and of this script's."""

    LIMIT = 16_000_000

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        self.script = pathlib.Path(__file__).read_bytes()

    def write(self, box: dict[str, object]) -> None:
        buffer = io.BytesIO()
        torch.save(box, buffer)
        raw = buffer.getvalue()
        packed = zstandard.ZstdCompressor(level=22).compress(raw) if zstandard else lzma.compress(raw, preset=9)
        self.path.write_bytes(packed)
        total = len(packed) + len(self.script)
        logger.info(f"Serialized model {'zstd' if zstandard else 'lzma'}: {len(packed)} bytes")
        logger.info(f"Code size: {len(self.script)} bytes")
        logger.info(f"Total submission size: {total} bytes")
        logger.info(f"sha256 of the artifact: {hashlib.sha256(packed).hexdigest()}")
        if total > self.LIMIT:
            raise RuntimeError(f"the submission has {total} bytes, {self.LIMIT} are allowed")

    def read(self) -> dict[str, object]:
        packed = self.path.read_bytes()
        raw = zstandard.ZstdDecompressor().decompress(packed) if zstandard else lzma.decompress(packed)
        return torch.load(io.BytesIO(raw), map_location="cpu")


# ======================================================================================================================
# The whole run
# ======================================================================================================================


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True


def main() -> None:
    settings = Settings.from_environment()
    cluster = Cluster.join()
    set_up_logging(settings, cluster)
    seed_everything(settings.seed)
    logger.info(f"Running PyTorch {torch.__version__}")
    logger.info(f"world_size:{cluster.world_size} seed:{settings.seed}")
    for entry in fields(settings):
        logger.info(f"  {entry.name}: {getattr(settings, entry.name)}")

    accountant = ByteAccountant(settings, cluster.device)
    validation = ShardReader(settings.validation_pattern).everything()
    logger.info(f"val_loader:shards pattern={settings.validation_pattern} tokens:{validation.numel() - 1}")
    quick = QuickEvaluator(settings, cluster, accountant, validation)

    trainer = Trainer(settings, cluster, quick)
    logger.info(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    model = trainer.run()

    # the clock of training runs on until the moments are taken: they read training data
    moments = Calibrator(settings, cluster).run(model)
    seconds = trainer.watch.stop()
    logger.info(f"training and calibration: {1000 * seconds:.0f}ms of {1000 * settings.max_wallclock_seconds:.0f}ms")
    if seconds > settings.max_wallclock_seconds:
        raise RuntimeError("the calibration ended after the training time")

    archive = Archive("final_model.bureau")
    quantizer = Quantizer(settings)
    if cluster.is_leader:
        archive.write(quantizer.run(model, moments))
    cluster.wait()

    restored = LanguageModel(settings).to(cluster.device)
    restored.load_state_dict(Quantizer.restored(archive.read()))

    watch = Stopwatch().start()
    logger.info(f"final_quick {quick.run(restored)} eval_time:{watch.milliseconds}ms")
    watch = Stopwatch().start()
    sliding = SlidingEvaluator(settings, cluster, accountant, validation).run(restored)
    logger.info(f"final_sliding {sliding} eval_time:{watch.milliseconds}ms")
    watch = Stopwatch().start()
    adaptive = AdaptiveEvaluator(settings, cluster, accountant, validation).run(restored)
    logger.info(f"final_adaptive {adaptive} eval_time:{watch.milliseconds}ms")
    logger.info(f"final_adaptive_exact {adaptive.exactly()}")
    if cluster.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
