"""Opera: a compact language model, its training, its packing and its examination.

    torchrun --standalone --nproc_per_node=8 train_gpt.py --seed 42 --set recipe.ema=0.9965 --set exam.rank=48

The parts: `Geometry` (shape), `Recipe` (training), `Storage` (what is written), `Exam` (how it is scored), `Paths`.
Every field of these can be set with `--set part.field=value`; what is not set keeps its default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import brotli
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# =====================================================================================================================
# Settings
# =====================================================================================================================


@dataclass
class Geometry:
    vocabulary: int = 4096
    width: int = 512
    layers: int = 10
    heads: int = 8
    groups: int = 4
    expansion: float = 3.5
    rotary_dims: int = 16
    rotary_base: float = 10_000.0
    softcap: float = 30.0
    smear_dims: int = 12
    bos: int = 1


@dataclass
class Recipe:
    context: int = 2048
    tokens_per_step: int = 786_432
    max_steps: int = 20_000
    seconds: float = 600.0
    reserve: float = 14.0
    warmdown_fraction: float = 0.6
    warmdown_floor: float = 0.08
    matrix_lr: float = 0.024
    table_lr: float = 0.032
    vector_lr: float = 0.02
    weight_decay: float = 0.08
    momentum: float = 0.97
    momentum_start: float = 0.9
    momentum_steps: int = 1200
    clip: float = 0.3
    ema: float = 0.9965
    averaging: str = "ema"
    rehearsals: int = 20
    report_every: int = 1000
    print_every: int = 250
    schedule: str = "clock"


@dataclass
class Storage:
    quantiser: str = "compensated"
    codec: str = "brotli"
    bits: int = 6
    table_bits: int = 8
    sigmas: float = 12.5
    table_sigmas: float = 18.0
    damping: float = 0.01
    block: int = 128
    calibration_rows: int = 256
    limit: int = 16_000_000
    artifact: str = "opera.model"


@dataclass
class Exam:
    scorer: str = "documents"
    stride: int = 64
    batch: int = 32
    piece: int = 64
    rank: int = 64
    alpha: float = 96.0
    lr: float = 1e-4
    beta2: float = 0.99
    decay: float = 0.5
    cache_weight: float = 0.02
    cache_prior: float = 64.0
    seconds: float = 600.0


@dataclass
class Paths:
    data: str = "./data/datasets/fineweb10B_sp4096"
    tokenizer: str = "./data/tokenizers/fineweb_4096_bpe.model"
    logs: str = "./logs"
    run: str = "opera"


@dataclass
class Job:
    seed: int = 42
    geometry: Geometry = field(default_factory=Geometry)
    recipe: Recipe = field(default_factory=Recipe)
    storage: Storage = field(default_factory=Storage)
    exam: Exam = field(default_factory=Exam)
    paths: Paths = field(default_factory=Paths)

    def assign(self, dotted: str) -> None:
        key, _, value = dotted.partition("=")
        part, _, name = key.partition(".")
        holder = getattr(self, part)
        kind = type(getattr(holder, name))
        setattr(holder, name, value in ("1", "true", "yes") if kind is bool else kind(value))

    @classmethod
    def from_command_line(cls) -> Job:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--seed", type=int, default=42)
        parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE")
        spoken = parser.parse_args()
        job = cls(seed=spoken.seed)
        for item in spoken.set:
            job.assign(item)
        return job


class Registry(dict[str, Callable[..., Any]]):
    """Names to makers; used as a decorator."""

    def __call__(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(thing: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = thing
            return thing

        return keep


SCHEDULES, AVERAGES, QUANTISERS, CODECS, SCORERS = (Registry() for _ in range(5))

# =====================================================================================================================
# The company: ranks, clocks, the log
# =====================================================================================================================


@dataclass
class Company:
    rank: int
    size: int
    device: torch.device

    @classmethod
    def gather(cls) -> Company:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl", device_id=device)
        return cls(rank, size, device)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def meet(self) -> None:
        torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier()

    def share(self, items: list[Any]) -> list[Any]:
        """This member's part of a list, the same at every run: item i goes to member i modulo size."""
        return items[self.rank :: self.size]


class Chronicle:
    def __init__(self, job: Job, company: Company) -> None:
        self.company = company
        self.path = Path(job.paths.logs) / f"{job.paths.run}_seed{job.seed}.log"
        if company.leads:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def __call__(self, text: str) -> None:
        if self.company.leads:
            print(text, flush=True)
            with self.path.open("a") as file:
                file.write(text + "\n")


class Stopwatches:
    """Named clocks that run only inside their `with`."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.spent: dict[str, float] = defaultdict(float)
        self.began: dict[str, float] = {}

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        self.company.meet()
        self.began[name] = time.perf_counter()
        try:
            yield
        finally:
            self.company.meet()
            self.spent[name] += time.perf_counter() - self.began.pop(name)

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        self.company.meet()
        self.spent[name] += time.perf_counter() - self.began.pop(name)
        try:
            yield
        finally:
            self.company.meet()
            self.began[name] = time.perf_counter()

    def read(self, name: str) -> float:
        running = time.perf_counter() - self.began[name] if name in self.began else 0.0
        return self.spent[name] + running


def narrated(verb: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Logs how long a method of something with `.say` took."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def told(self: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(self, *args, **kwargs)
            self.say(f"{verb}: {time.perf_counter() - begin:.1f}s")
            return result

        return told

    return wrap


# =====================================================================================================================
# Text: shards, batches, documents, bytes
# =====================================================================================================================

HEADER = 256


@dataclass(frozen=True)
class Shard:
    path: str

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        head = np.fromfile(self.path, dtype="<i4", count=HEADER)
        if head[0] != 20240520:
            raise ValueError(f"{self.path} is no shard")
        return np.memmap(self.path, dtype="<u2", mode="r", offset=4 * HEADER, shape=(int(head[2]),))


class Library:
    def __init__(self, paths: Paths) -> None:
        self.root = Path(paths.data)

    def shards(self, split: str) -> list[Shard]:
        found = [Shard(path) for path in sorted(glob.glob(str(self.root / f"fineweb_{split}_*.bin")))]
        if not found:
            raise FileNotFoundError(f"{self.root}: no {split} shards")
        return found

    def everything(self, split: str) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in self.shards(split)]))


class Ration:
    """Training rows without end, in an order that the seed alone decides."""

    def __init__(self, library: Library, recipe: Recipe, company: Company, seed: int) -> None:
        self.shards = library.shards("train")
        self.recipe, self.company = recipe, company
        self.chance = np.random.default_rng(seed)
        self.rows = recipe.tokens_per_step // recipe.context // company.size

    def pieces(self) -> Iterator[np.ndarray]:
        size = self.recipe.context
        while True:
            for which in self.chance.permutation(len(self.shards)):
                tokens = self.shards[which].tokens
                phase = int(self.chance.integers(size))
                for begin in self.chance.permutation((len(tokens) - 1 - phase) // size):
                    at = phase + int(begin) * size
                    yield tokens[at : at + size + 1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = self.pieces()
        while True:
            taken = [next(source) for _ in range(self.rows * self.company.size)]
            mine = np.stack(self.company.share(taken)).astype(np.int64)
            rows = torch.from_numpy(mine).pin_memory().to(self.company.device, non_blocking=True)
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@dataclass(frozen=True)
class Document:
    """tokens[0] opens it; every later token is a target. The opening of the next document is its last target."""

    number: int
    tokens: Tensor

    @property
    def targets(self) -> int:
        return self.tokens.numel() - 1


def documents(stream: Tensor, bos: int) -> list[Document]:
    starts = (stream == bos).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        starts = [0, *starts]
    ends = [*starts[1:], stream.numel() - 1]
    cut = [Document(i, stream[a : b + 1]) for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]
    assert sum(d.targets for d in cut) == stream.numel() - 1
    return cut


class ByteRuler:
    """UTF-8 bytes of the original text that a target stands for."""

    def __init__(self, geometry: Geometry, paths: Paths, device: torch.device) -> None:
        pieces = sentencepiece.SentencePieceProcessor(model_file=paths.tokenizer)
        assert pieces.vocab_size() == geometry.vocabulary
        length, opens, silent = [], [], []
        for token in range(geometry.vocabulary):
            text = pieces.id_to_piece(token)
            mute = pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token)
            spaced = not mute and not pieces.is_byte(token) and text.startswith("▁")
            if mute:
                size = 0
            elif pieces.is_byte(token):
                size = 1
            else:
                size = len(text.removeprefix("▁").encode())
            length.append(size)
            opens.append(spaced)
            silent.append(mute)
        self.length = torch.tensor(length, device=device)
        self.opens = torch.tensor(opens, device=device)
        self.silent = torch.tensor(silent, device=device)

    def measure(self, before: Tensor, target: Tensor) -> Tensor:
        return self.length[target] + (self.opens[target] & ~self.silent[before]).long()


class Ledger:
    """Nats, targets and bytes, in double precision; what is entered stays."""

    def __init__(self, ruler: ByteRuler, company: Company) -> None:
        self.ruler, self.company = ruler, company
        self.sums = torch.zeros(3, dtype=torch.float64, device=company.device)

    def enter(self, nats: Tensor, before: Tensor, target: Tensor) -> None:
        weights = self.ruler.measure(before, target)
        self.sums += torch.stack(
            (nats.double().sum(), torch.tensor(float(nats.numel()), device=nats.device).double(), weights.double().sum())
        )

    def balance(self) -> Verdict:
        nats, count, weight = self.company.total(self.sums.clone()).tolist()
        return Verdict(nats / count, nats / math.log(2) / weight, int(count), int(weight))


@dataclass(frozen=True)
class Verdict:
    loss: float
    bits_per_byte: float
    targets: int
    bytes: int

    def __str__(self) -> str:
        return f"loss {self.loss:.6f} bpb {self.bits_per_byte:.6f} targets {self.targets} bytes {self.bytes}"


# =====================================================================================================================
# The model
# =====================================================================================================================


class Dense(nn.Linear):
    def __init__(self, inside: int, outside: int, zero: bool = False) -> None:
        super().__init__(inside, outside, bias=False)
        nn.init.zeros_(self.weight) if zero else nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.dims = geometry.rotary_dims
        rates = geometry.rotary_base ** (-torch.arange(0, self.dims, 2).float() / self.dims)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.size(1), device=x.device).float()[:, None] * self.rates
        cos, sin = (f(angle).to(x.dtype)[None, :, None] for f in (torch.cos, torch.sin))
        a, b, rest = x.split((self.dims // 2, self.dims // 2, x.size(-1) - self.dims), -1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


class Attention(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.heads, self.groups = geometry.heads, geometry.groups
        self.size = geometry.width // geometry.heads
        self.query = Dense(geometry.width, geometry.width)
        self.key = Dense(geometry.width, geometry.groups * self.size)
        self.value = Dense(geometry.width, geometry.groups * self.size)
        self.out = Dense(geometry.width, geometry.width, zero=True)
        self.sharpness = nn.Parameter(torch.full((geometry.heads,), 2.0))
        self.gate = nn.Parameter(torch.zeros(geometry.heads, geometry.smear_dims))
        self.rotary = Rotary(geometry)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = normed(self.query(x).view(b, t, self.heads, self.size))
        k = normed(self.key(x).view(b, t, self.groups, self.size))
        v = self.value(x).view(b, t, self.groups, self.size)
        q = self.rotary(q) * self.sharpness.to(x.dtype)[:, None]
        k = self.rotary(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        opening = 2 * torch.sigmoid(F.linear(x[..., : self.gate.size(1)], self.gate.to(x.dtype)))
        return self.out((y * opening[..., None]).reshape(b, t, -1))


class Feed(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        inner = int(geometry.width * geometry.expansion)
        self.up = Dense(geometry.width, inner)
        self.down = Dense(inner, geometry.width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x), 0.3).square())


class Layer(nn.Module):
    def __init__(self, geometry: Geometry, depth: int) -> None:
        super().__init__()
        self.attention, self.feed = Attention(geometry), Feed(geometry)
        self.damp = 1.0 / math.sqrt(depth + 1)
        self.scales = nn.Parameter(torch.ones(2, geometry.width))
        self.blend = nn.Parameter(torch.stack((torch.ones(geometry.width), torch.zeros(geometry.width))))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        blend, scales = self.blend.to(x.dtype), self.scales.to(x.dtype)
        x = blend[0] * x + blend[1] * first
        x = x + scales[0] * self.attention(self.damp * normed(x))
        return x + scales[1] * self.feed(self.damp * normed(x))


class Opera(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.table = nn.Embedding(geometry.vocabulary, geometry.width)
        nn.init.normal_(self.table.weight, std=0.005)
        self.layers = nn.ModuleList(Layer(geometry, i) for i in range(geometry.layers))
        self.smear = nn.Parameter(torch.zeros(geometry.smear_dims))
        self.smear_scale = nn.Parameter(torch.zeros(()))
        self.bridges = nn.Parameter(torch.zeros(geometry.layers // 2, geometry.width))

    def smeared(self, tokens: Tensor, x: Tensor) -> Tensor:
        """A little of the token before, but never of the document before."""
        opening = torch.sigmoid((x[..., : self.smear.numel()] * self.smear.to(x.dtype)).sum(-1, keepdim=True))
        inside = (tokens != self.geometry.bos).unsqueeze(-1).to(x.dtype)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x + self.smear_scale.to(x.dtype) * opening * before * inside

    def features(self, tokens: Tensor) -> Tensor:
        x = self.table.weight.to(torch.bfloat16)[tokens]
        first = x = normed(self.smeared(tokens, x))
        stack: list[Tensor] = []
        half = len(self.layers) // 2
        for i, layer in enumerate(self.layers):
            if i >= half and stack:
                x = x + self.bridges[len(stack) - 1].to(x.dtype) * stack.pop()
            x = layer(x, first)
            if i < half:
                stack.append(x)
        return normed(x)

    def logits(self, tokens: Tensor) -> Tensor:
        raw = F.linear(self.features(tokens), self.table.weight.to(torch.bfloat16)).float()
        return self.geometry.softcap * torch.tanh(raw / self.geometry.softcap)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.logits(tokens)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def matrices(self) -> Iterator[tuple[str, Dense]]:
        yield from ((name, part) for name, part in self.named_modules() if isinstance(part, Dense))


# =====================================================================================================================
# Optimisation
# =====================================================================================================================


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    x = update.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[nn.Parameter], company: Company, **defaults: float) -> None:
        super().__init__(list(params), dict(momentum=0.95, weight_decay=0.0) | defaults)
        self.company = company

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            flat = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16, device=self.company.device)
            parts = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
            for i, (p, part) in enumerate(zip(params, parts, strict=True)):
                memory = self.state[p].setdefault("memory", torch.zeros_like(p))
                memory.mul_(group["momentum"]).add_(p.grad)
                if i % self.company.size == self.company.rank:
                    update = p.grad.add(memory, alpha=group["momentum"])
                    part.copy_(orthogonalised(update) * max(1.0, p.size(0) / p.size(1)) ** 0.5)
            self.company.total(flat)
            for p, part in zip(params, parts, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(part.float(), alpha=-group["lr"])


def optimisers(model: Opera, recipe: Recipe, company: Company) -> list[torch.optim.Optimizer]:
    dense = [part.weight for _, part in model.matrices()]
    owned = {id(p) for p in dense} | {id(model.table.weight)}
    small = [p for p in model.parameters() if id(p) not in owned]
    adam = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, fused=True)
    made: list[torch.optim.Optimizer] = [
        Muon(dense, company, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        adam([model.table.weight], lr=recipe.table_lr, weight_decay=recipe.weight_decay),
        adam(small, lr=recipe.vector_lr, weight_decay=0.02),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["full_lr"] = group["lr"]
    return made


@SCHEDULES("clock")
def by_clock(recipe: Recipe, elapsed: float, step: int) -> float:
    done = elapsed / (recipe.seconds - recipe.reserve)
    return min(1.0, max((1 - done) / recipe.warmdown_fraction, recipe.warmdown_floor))


@SCHEDULES("steps")
def by_steps(recipe: Recipe, elapsed: float, step: int) -> float:
    done = step / recipe.max_steps
    return min(1.0, max((1 - done) / recipe.warmdown_fraction, recipe.warmdown_floor))


# =====================================================================================================================
# The trainer and those who listen to it
# =====================================================================================================================


class Listener(Protocol):
    def started(self, trainer: Trainer) -> None: ...

    def stepped(self, trainer: Trainer) -> None: ...

    def finished(self, trainer: Trainer) -> None: ...


class Silent:
    def started(self, trainer: Trainer) -> None: ...

    def stepped(self, trainer: Trainer) -> None: ...

    def finished(self, trainer: Trainer) -> None: ...


@AVERAGES("ema")
class MovingAverage(Silent):
    def started(self, trainer: Trainer) -> None:
        self.kept = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    @torch.no_grad()
    def stepped(self, trainer: Trainer) -> None:
        live = [p.detach() for _, p in trainer.model.named_parameters()]
        torch._foreach_lerp_(list(self.kept.values()), live, 1 - trainer.recipe.ema)

    @torch.no_grad()
    def finished(self, trainer: Trainer) -> None:
        for name, p in trainer.model.named_parameters():
            p.copy_(self.kept[name])


@AVERAGES("tail")
class TailAverage(Silent):
    """The mean of the weights at every 40th step of the last fifth of the clock."""

    def started(self, trainer: Trainer) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def stepped(self, trainer: Trainer) -> None:
        if trainer.scale > 0.33 or trainer.step % 40:
            return
        for name, p in trainer.model.named_parameters():
            self.sums[name] = self.sums.get(name, torch.zeros_like(p)) + p
        self.count += 1

    @torch.no_grad()
    def finished(self, trainer: Trainer) -> None:
        if self.count:
            for name, p in trainer.model.named_parameters():
                p.copy_(self.sums[name] / self.count)


@AVERAGES("none")
class LastWeights(Silent):
    pass


class Announcer(Silent):
    def stepped(self, trainer: Trainer) -> None:
        if trainer.step % trainer.recipe.print_every == 0:
            spent = trainer.watches.read("training")
            each = 1000 * spent / trainer.step
            trainer.say(f"step {trainer.step} loss {trainer.loss:.4f} scale {trainer.scale:.3f} {spent:.1f}s {each:.2f}ms")


class Observer(Silent):
    """Writes the held-out loss into the log now and then. Nothing reads it."""

    def __init__(self, look: Callable[[], Verdict]) -> None:
        self.look = look

    def stepped(self, trainer: Trainer) -> None:
        if trainer.step % trainer.recipe.report_every == 0:
            with trainer.watches.paused("training"):
                trainer.say(f"step {trainer.step} held-out {self.look()}")


class Trainer:
    def __init__(self, job: Job, company: Company, model: Opera, watches: Stopwatches, say: Chronicle) -> None:
        self.recipe, self.company, self.model, self.watches, self.say = job.recipe, company, model, watches, say
        self.job = job
        self.optimisers = optimisers(model, self.recipe, company)
        self.listeners: list[Listener] = []
        self.step, self.scale, self.loss = 0, 1.0, float("nan")
        module: nn.Module = model
        if company.size > 1:
            module = DistributedDataParallel(model, device_ids=[company.device.index], broadcast_buffers=False)
        self.run = torch.compile(module, dynamic=False)

    def tell(self, event: str) -> None:
        for listener in self.listeners:
            getattr(listener, event)(self)

    def update(self, rows: tuple[Tensor, Tensor], scale: float) -> Tensor:
        loss: Tensor = self.run(*rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        ramp = min(1.0, self.step / self.recipe.momentum_steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = (1 - ramp) * self.recipe.momentum_start + ramp * self.recipe.momentum
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def rehearse(self, rows: int) -> None:
        """Compiles every path on random tokens, then puts everything back."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        noise = torch.randint(0, self.model.geometry.vocabulary, (rows, self.recipe.context + 1), device=self.company.device)
        for _ in range(self.recipe.rehearsals):
            self.update((noise[:, :-1].contiguous(), noise[:, 1:].contiguous()), 0.0)
        self.model.load_state_dict(before)
        for optimiser in self.optimisers:
            optimiser.state.clear()

    def train(self, ration: Ration) -> Iterator[tuple[Tensor, Tensor]]:
        self.rehearse(ration.rows)
        stream = iter(ration)
        schedule = SCHEDULES[self.recipe.schedule]
        self.tell("started")
        with self.watches.running("training"):
            while self.step < self.recipe.max_steps:
                elapsed = self.watches.read("training")
                if self.company.any(elapsed >= self.recipe.seconds - self.recipe.reserve):
                    break
                self.scale = schedule(self.recipe, elapsed, self.step)
                self.loss = self.update(next(stream), self.scale).item()
                self.step += 1
                self.tell("stepped")
        self.tell("finished")
        return stream


# =====================================================================================================================
# Storage
# =====================================================================================================================


@contextlib.contextmanager
def listening(model: Opera) -> Iterator[dict[str, Tensor]]:
    """Second moments of what enters every matrix while inside."""
    heard: dict[str, Tensor] = {}
    hooks = []

    def hear(name: str, part: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        heard[name] = heard.get(name, torch.zeros(x.size(1), x.size(1), device=x.device)).addmm_(x.T, x)

    for name, part in model.matrices():
        hooks.append(part.register_forward_pre_hook(functools.partial(hear, name)))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def grid(weight: Tensor, bits: int, sigmas: float) -> tuple[Tensor, int]:
    top = 2 ** (bits - 1) - 1
    return (sigmas * weight.std(1) / top).clamp_min(1e-8).half().float(), top


@QUANTISERS("nearest")
def nearest(weight: Tensor, moments: Tensor | None, bits: int, sigmas: float, storage: Storage) -> tuple[Tensor, Tensor]:
    scale, top = grid(weight, bits, sigmas)
    return (weight / scale[:, None]).round().clamp(-top, top).char(), scale.half()


@QUANTISERS("compensated")
def compensated(weight: Tensor, moments: Tensor | None, bits: int, sigmas: float, storage: Storage) -> tuple[Tensor, Tensor]:
    if moments is None:
        return nearest(weight, None, bits, sigmas, storage)
    scale, top = grid(weight, bits, sigmas)
    idle = moments.diagonal() == 0
    moments = moments.clone()
    moments.diagonal()[idle] = 1
    moments.diagonal().add_(storage.damping * moments.diagonal().mean())
    order = moments.diagonal().argsort(descending=True)
    work = weight.masked_fill(idle[None], 0)[:, order]
    lower = torch.linalg.cholesky(moments[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    codes = torch.zeros_like(work)
    for begin in range(0, work.size(1), storage.block):
        end = min(begin + storage.block, work.size(1))
        slips = torch.zeros(work.size(0), end - begin, device=work.device)
        for j in range(begin, end):
            codes[:, j] = (work[:, j] / scale).round().clamp(-top, top)
            slip = (work[:, j] - codes[:, j] * scale) / factor[j, j]
            work[:, j + 1 : end] -= slip[:, None] * factor[j, j + 1 : end]
            slips[:, j - begin] = slip
        work[:, end:] -= slips @ factor[begin:end, end:]
    return codes[:, order.argsort()].char(), scale.half()


@CODECS("brotli")
def by_brotli() -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    return functools.partial(brotli.compress, quality=11, lgwin=24), brotli.decompress


@CODECS("lzma")
def by_lzma() -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    import lzma

    return functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME), lzma.decompress


class Vault:
    """Writes the model as the artifact and reads the artifact back into it."""

    def __init__(self, job: Job, company: Company, say: Chronicle) -> None:
        self.storage, self.company, self.say = job.storage, company, say
        self.path = Path(job.storage.artifact)
        self.squeeze, self.stretch = CODECS[job.storage.codec]()

    @narrated("calibration")
    def listen(self, model: Opera, stream: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        rows = itertools.chain.from_iterable(tokens for tokens, _ in stream)
        share = max(1, self.storage.calibration_rows // self.company.size)
        with torch.no_grad(), listening(model) as heard:
            for row in itertools.islice(rows, share):
                model(row[None])
        return {name: self.company.total(value) / share for name, value in heard.items()}

    def frozen(self, model: Opera, heard: dict[str, Tensor]) -> dict[str, Tensor]:
        quantise = QUANTISERS[self.storage.quantiser]
        kept: dict[str, Tensor] = {}
        dense = dict(model.matrices())
        for name, value in model.state_dict().items():
            owner = name.removesuffix(".weight")
            if owner in dense:
                pair = quantise(value.float(), heard[owner], self.storage.bits, self.storage.sigmas, self.storage)
            elif name == "table.weight":
                pair = nearest(value.float(), None, self.storage.table_bits, self.storage.table_sigmas, self.storage)
            else:
                kept[name] = value.half().cpu()
                continue
            kept[name + ":codes"], kept[name + ":scale"] = (t.cpu() for t in pair)
        return kept

    @narrated("packing")
    def write(self, model: Opera, heard: dict[str, Tensor]) -> None:
        if self.company.leads:
            buffer = io.BytesIO()
            torch.save(self.frozen(model, heard), buffer)
            self.path.write_bytes(self.squeeze(buffer.getvalue()))
            self.weigh()
        self.company.meet()

    def weigh(self) -> int:
        model_bytes = self.path.stat().st_size
        code_bytes = Path(__file__).stat().st_size
        total = model_bytes + code_bytes
        self.say(f"artifact: model {model_bytes} + code {code_bytes} = {total} bytes of {self.storage.limit}")
        if total > self.storage.limit:
            raise SystemExit("the artifact is too large")
        return total

    def read(self, model: Opera) -> Opera:
        kept = torch.load(io.BytesIO(self.stretch(self.path.read_bytes())), map_location=self.company.device)
        state = {}
        for name in model.state_dict():
            if name in kept:
                state[name] = kept[name].float()
            else:
                state[name] = kept[name + ":codes"].float() * kept[name + ":scale"].float()[:, None]
        model.load_state_dict(state)
        return model


# =====================================================================================================================
# The examination
# =====================================================================================================================


class Adapters(nn.Module):
    """One low-rank addition per document and matrix. Off the model's own parameters, which stay as they are."""

    SITES = ("query", "value", "out", "up", "down")

    def __init__(self, model: Opera, exam: Exam, rows: int) -> None:
        super().__init__()
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.scale = exam.alpha / exam.rank
        self.model = [model]
        for name, part in model.matrices():
            if name.rsplit(".", 1)[-1] in self.SITES:
                bound = part.in_features**-0.5
                down = torch.empty(rows, exam.rank, part.in_features, device=part.weight.device).uniform_(-bound, bound)
                up = torch.zeros(rows, part.out_features, exam.rank, device=part.weight.device)
                self.pairs[name] = (nn.Parameter(down), nn.Parameter(up))

    def trainable(self) -> list[nn.Parameter]:
        return [p for pair in self.pairs.values() for p in pair]

    def extra(self, name: str, part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        down, up = (p.to(out.dtype) for p in self.pairs[name])
        return out + self.scale * torch.bmm(torch.bmm(args[0], down.transpose(1, 2)), up.transpose(1, 2))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            part.register_forward_hook(functools.partial(self.extra, name))
            for name, part in self.model[0].matrices()
            if name in self.pairs
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Recency:
    """Counts of what each document has already shown, as a distribution over the whole vocabulary."""

    def __init__(self, rows: int, geometry: Geometry, exam: Exam, device: torch.device) -> None:
        self.counts = torch.zeros(rows, geometry.vocabulary, device=device)
        self.prior, self.weight = exam.cache_prior, exam.cache_weight

    def distribution(self) -> Tensor:
        size = self.counts.size(1)
        return (self.counts + self.prior / size) / (self.counts.sum(1, keepdim=True) + self.prior)

    def blend(self, logits: Tensor) -> Tensor:
        """Log probabilities of every token: the model's and the cache's, mixed by a weight that never changes."""
        own = torch.log_softmax(logits, -1) + math.log1p(-self.weight)
        other = self.distribution().log()[:, None] + math.log(self.weight)
        return torch.logaddexp(own, other)

    def learn(self, row: int, tokens: Tensor) -> None:
        self.counts[row] += torch.bincount(tokens, minlength=self.counts.size(1)).float()


@dataclass(frozen=True)
class Page:
    """One piece of one document: what the model is shown, what it must say, and which of it counts."""

    row: int
    shown: Tensor
    answers: Tensor
    first: int
    last: bool


def pages(batch: list[Document], number: int, size: int, context: int) -> Iterator[Page]:
    for row, document in enumerate(batch):
        begin, end = number * size, min((number + 1) * size, document.targets)
        if begin >= document.targets:
            continue
        start = max(0, end - context)
        yield Page(
            row,
            document.tokens[start:end],
            document.tokens[start + 1 : end + 1],
            begin - start,
            end == document.targets,
        )


def desk(found: list[Page], rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Shown tokens, answers and the mask of what counts, padded on the right."""
    width = max(page.shown.numel() for page in found)
    shown, answers = (torch.zeros(rows, width, dtype=torch.int64) for _ in range(2))
    counted = torch.zeros(rows, width, dtype=torch.bool)
    for page in found:
        n = page.shown.numel()
        shown[page.row, :n], answers[page.row, :n] = page.shown, page.answers
        counted[page.row, page.first : n] = True
    return shown.to(device), answers.to(device), counted.to(device)


@dataclass
class Examiner:
    job: Job
    company: Company
    model: Opera
    ruler: ByteRuler
    stream: Tensor
    say: Chronicle

    def ledger(self) -> Ledger:
        return Ledger(self.ruler, self.company)

    def batches(self, items: list[Any]) -> Iterator[list[Any]]:
        for at in range(0, len(items), self.job.exam.batch):
            yield items[at : at + self.job.exam.batch]


def flat(examiner: Examiner) -> Verdict:
    """Rows side by side without overlap: the quick figure for the log."""
    size = examiner.job.recipe.context
    ledger, device = examiner.ledger(), examiner.company.device
    edges = list(range(0, examiner.stream.numel() - 1, size))
    with torch.inference_mode():
        for begin in examiner.company.share(edges):
            row = examiner.stream[begin : begin + size + 1].to(device)
            logits = examiner.model(row[None, :-1])[0]
            ledger.enter(F.cross_entropy(logits, row[1:], reduction="none"), row[:-1], row[1:])
    return ledger.balance()


@SCORERS("strided")
def strided(examiner: Examiner) -> Verdict:
    """A fixed predictor: every target once, with as much text before it as the window holds."""
    size, stride, total = examiner.job.recipe.context, examiner.job.exam.stride, examiner.stream.numel() - 1
    spans = [(0, 0, min(size, total))]
    spans += [(min(b + stride, total) - size, b, min(b + stride, total)) for b in range(size, total, stride)]
    ledger, device = examiner.ledger(), examiner.company.device
    with torch.inference_mode():
        for group in examiner.batches(examiner.company.share(spans)):
            for start, begin, end in group:
                row = examiner.stream[start : end + 1].to(device)
                nats = F.cross_entropy(examiner.model(row[None, :-1])[0], row[1:], reduction="none")
                own = slice(begin - start, end - start)
                ledger.enter(nats[own], row[:-1][own], row[1:][own])
    return ledger.balance()


@SCORERS("documents")
def by_documents(examiner: Examiner) -> Verdict:
    """Document by document; each is scored piece by piece, and its adapters learn a piece after it was scored."""
    exam, company = examiner.job.exam, examiner.company
    ledger = examiner.ledger()
    mine = company.share(documents(examiner.stream, examiner.model.geometry.bos))
    examiner.model.requires_grad_(False)
    for number, batch in enumerate(examiner.batches(mine)):
        study(examiner, batch, ledger)
        if number % 50 == 0:
            examiner.say(f"documents: batch {number} of {math.ceil(len(mine) / exam.batch)}")
    examiner.model.requires_grad_(True)
    return ledger.balance()


def study(examiner: Examiner, batch: list[Document], ledger: Ledger) -> None:
    exam, device = examiner.job.exam, examiner.company.device
    adapters = Adapters(examiner.model, exam, len(batch))
    optimiser = torch.optim.AdamW(
        adapters.trainable(), lr=exam.lr, betas=(0.0, exam.beta2), eps=1e-10, weight_decay=exam.decay
    )
    recency = Recency(len(batch), examiner.model.geometry, exam, device)
    longest = max(document.targets for document in batch)
    with adapters.attached():
        for number in range(math.ceil(longest / exam.piece)):
            found = list(pages(batch, number, exam.piece, examiner.job.recipe.context))
            shown, answers, counted = desk(found, len(batch), device)
            logits = examiner.model(shown)
            said = recency.blend(logits.detach()).gather(2, answers[..., None])[..., 0]
            ledger.enter(-said[counted], shown[counted], answers[counted])
            for page in found:
                recency.learn(page.row, answers[page.row][counted[page.row]])
            going_on = torch.tensor([p.row for p in found if not p.last], device=device)
            if going_on.numel():
                lesson(optimiser, logits, answers, counted, going_on)


def lesson(optimiser: torch.optim.Optimizer, logits: Tensor, answers: Tensor, counted: Tensor, rows: Tensor) -> None:
    """One step on what was just scored, for the documents that have more to come."""
    nats = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
    mean = (nats * counted).sum(1) / counted.sum(1).clamp_min(1)
    optimiser.zero_grad(set_to_none=True)
    mean[rows].sum().backward()
    optimiser.step()


# =====================================================================================================================
# The whole
# =====================================================================================================================


class Production:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.company = Company.gather()
        self.say = Chronicle(job, self.company)
        self.watches = Stopwatches(self.company)
        torch.manual_seed(job.seed)
        torch.set_float32_matmul_precision("high")
        self.library = Library(job.paths)
        self.ruler = ByteRuler(job.geometry, job.paths, self.company.device)
        self.model = Opera(job.geometry).to(self.company.device)
        self.vault = Vault(job, self.company, self.say)

    def examiner(self) -> Examiner:
        return Examiner(self.job, self.company, self.model, self.ruler, self.held_out, self.say)

    @functools.cached_property
    def held_out(self) -> Tensor:
        return self.library.everything("val")

    def train(self) -> None:
        trainer = Trainer(self.job, self.company, self.model, self.watches, self.say)
        trainer.listeners += [AVERAGES[self.job.recipe.averaging](), Announcer()]
        trainer.listeners.append(Observer(lambda: flat(self.examiner())))
        stream = trainer.train(Ration(self.library, self.job.recipe, self.company, self.job.seed))
        with self.watches.running("training"):
            heard = self.vault.listen(self.model, stream)
        spent = self.watches.read("training")
        self.say(f"training and calibration: {trainer.step} steps, {spent:.1f}s of {self.job.recipe.seconds:.0f}s")
        assert spent <= self.job.recipe.seconds, "over the training time"
        self.vault.write(self.model, heard)

    def examine(self) -> Verdict:
        self.vault.read(self.model)
        self.company.meet()
        with self.watches.running("examination"):
            verdict = SCORERS[self.job.exam.scorer](self.examiner())
        spent = self.watches.read("examination")
        self.say(f"examination: {spent:.1f}s of {self.job.exam.seconds:.0f}s")
        assert spent <= self.job.exam.seconds, "over the evaluation time"
        assert verdict.targets == self.held_out.numel() - 1, "targets are missing"
        return verdict

    def perform(self) -> None:
        self.say(json.dumps(dataclasses.asdict(self.job)))
        self.say(f"parameters {sum(p.numel() for p in self.model.parameters())} ranks {self.company.size}")
        self.train()
        verdict = self.examine()
        self.say(f"RESULT {verdict}")
        if self.company.leads:
            Path("result.json").write_text(json.dumps(dataclasses.asdict(verdict) | {"seed": self.job.seed}))
        if self.company.size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    Production(Job.from_command_line()).perform()
