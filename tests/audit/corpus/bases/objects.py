#!/usr/bin/env python3
"""Train, pack and score a language model: Settings -> Trainer -> Packer -> Evaluator(Scorer)."""

import abc
import argparse
import dataclasses
import enum
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import pathlib
import sys
import time
import typing as t

import numpy
import sentencepiece
import torch
import torch.distributed as td
import torch.nn as nn
import torch.nn.functional as tf
from torch.optim.swa_utils import AveragedModel

LOGGER = logging.getLogger("golf")
LIMIT_BYTES = 16_000_000
LN2 = math.log(2.0)


class Adapt(enum.Enum):
    NONE = "none"
    SLOT = "slot"
    ONLINE = "online"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    folder: pathlib.Path = pathlib.Path("data/fineweb_sp1024")
    tokenizer: pathlib.Path = pathlib.Path("data/fineweb_1024_bpe.model")
    vocabulary: int = 1024

    def shards(self, split: str) -> t.List[pathlib.Path]:
        found = sorted(self.folder.glob(f"fineweb_{split}_*.bin"))
        if not found:
            raise FileNotFoundError(f"{self.folder}: no {split} shards")
        return found


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    width: int = 512
    depth: int = 10
    heads: int = 8
    groups: int = 4
    hidden: int = 1536
    context: int = 2048
    cap: float = 30.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    seconds: float = 600.0
    reserve: float = 12.0
    batch: int = 524_288
    matrix_rate: float = 0.025
    other_rate: float = 0.003
    cooldown: float = 0.5
    average_from: float = 0.85
    warm_steps: int = 10


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    stride: int = 64
    windows: int = 16
    adapt: Adapt = Adapt.SLOT
    slot_steps: int = 6
    slot_rate: float = 0.004
    online_rate: float = 0.001
    online_tokens: int = 65_536
    seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class Settings:
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvalSettings = EvalSettings()
    seed: int = 7
    artifact: pathlib.Path = pathlib.Path("artifact.xz")

    @classmethod
    def parse(cls, argv: t.Optional[t.Sequence[str]] = None) -> "Settings":
        parser = argparse.ArgumentParser()
        parser.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE")
        parser.add_argument("--seed", type=int, default=int(os.getenv("SEED", "7")))
        chosen = parser.parse_args(argv)
        groups = {f.name: getattr(cls(), f.name) for f in dataclasses.fields(cls)}
        for word in chosen.set:
            path, _, raw = word.partition("=")
            group, _, key = path.partition(".")
            old = getattr(groups[group], key)
            kind = type(old)
            groups[group] = dataclasses.replace(groups[group], **{key: kind(raw)})
        groups["seed"] = chosen.seed
        return cls(**groups)


class World:
    """Rank, size and device, and the few collectives that are needed."""

    def __init__(self) -> None:
        self.rank = int(os.getenv("RANK", "0"))
        self.size = int(os.getenv("WORLD_SIZE", "1"))
        self.device = torch.device("cuda", int(os.getenv("LOCAL_RANK", "0")))
        torch.cuda.set_device(self.device)
        if self.size > 1:
            td.init_process_group("nccl", device_id=self.device)

    @property
    def chief(self) -> bool:
        return self.rank == 0

    def total(self, *numbers: torch.Tensor) -> None:
        if self.size > 1:
            for number in numbers:
                td.all_reduce(number)

    def mean_gradients(self, parameters: t.Iterable[nn.Parameter]) -> None:
        if self.size > 1:
            for p in parameters:
                if p.grad is not None:
                    td.all_reduce(p.grad, op=td.ReduceOp.AVG)

    def any(self, flag: bool) -> bool:
        if self.size == 1:
            return flag
        word = torch.tensor(int(flag), device=self.device)
        td.all_reduce(word, op=td.ReduceOp.MAX)
        return bool(word)

    def wait(self) -> None:
        if self.size > 1:
            td.barrier()

    def say(self, text: str) -> None:
        if self.chief:
            LOGGER.info(text)


class Shard:
    MAGIC = 20240520

    def __init__(self, path: pathlib.Path) -> None:
        head = numpy.fromfile(path, dtype="<i4", count=256)
        if head[0] != self.MAGIC:
            raise ValueError(f"{path}: not a shard")
        self.count = int(head[2])
        self.path = path

    def __len__(self) -> int:
        return self.count

    @functools.cached_property
    def tokens(self) -> numpy.ndarray:
        return numpy.memmap(self.path, dtype="<u2", mode="r", offset=1024, shape=(self.count,))


class Stream:
    """Training tokens without end, this rank's share of each step."""

    def __init__(self, data: DataSettings, world: World, context: int, batch: int) -> None:
        self.paths = data.shards("train")
        self.world, self.context, self.share = world, context, batch // world.size

    def __iter__(self) -> t.Iterator[t.Tuple[torch.Tensor, torch.Tensor]]:
        step = self.share * self.world.size
        for path in itertools.cycle(self.paths):
            tokens = Shard(path).tokens
            for at in range(self.world.rank * self.share, len(tokens) - step - 1, step):
                piece = torch.from_numpy(tokens[at : at + self.share + 1].astype(numpy.int64)).to(self.world.device)
                yield piece[:-1].view(-1, self.context), piece[1:].view(-1, self.context)


class ByteLedger:
    """Bytes of the original text under each token, by the token before it."""

    def __init__(self, data: DataSettings, device: torch.device) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer))
        table = [self._row(processor, i) for i in range(data.vocabulary)]
        self.own = torch.tensor([row[0] for row in table], device=device)
        self.spaced = torch.tensor([row[1] for row in table], device=device)
        self.edge = torch.tensor([row[2] for row in table], device=device)

    @staticmethod
    def _row(p: sentencepiece.SentencePieceProcessor, i: int) -> t.Tuple[int, bool, bool]:
        if p.is_control(i) or p.is_unknown(i) or p.is_unused(i):
            return 0, False, True
        if p.is_byte(i):
            return 1, False, False
        text = p.id_to_piece(i)
        spaced = text.startswith("\u2581")
        return len(text[1:].encode() if spaced else text.encode()), spaced, False

    def count(self, before: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return (self.own[token] + (self.spaced[token] & ~self.edge[before]).int()).double()


class Attention(nn.Module):
    def __init__(self, s: ModelSettings) -> None:
        super().__init__()
        self.heads, self.groups, self.size = s.heads, s.groups, s.width // s.heads
        self.inward = nn.Linear(s.width, (s.heads + 2 * s.groups) * self.size, bias=False)
        self.outward = nn.Linear(s.width, s.width, bias=False)
        nn.init.zeros_(self.outward.weight)
        frequency = 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angle = torch.outer(torch.arange(s.context), frequency)
        self.register_buffer("turns", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * self.turns[: x.size(1), None]).flatten(-2).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.inward(x).unflatten(-1, (-1, self.size)).split((self.heads, self.groups, self.groups), dim=2)
        q, k = (self._turn(tf.rms_norm(part, (self.size,))) for part in parts[:2])
        y = tf.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), parts[2].transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.outward(y.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, s: ModelSettings) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(s.width, s.hidden, False), nn.Linear(s.hidden, s.width, False)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.relu(self.widen(x)).square())


class Residual(nn.Module):
    def __init__(self, s: ModelSettings) -> None:
        super().__init__()
        self.attention, self.feed = Attention(s), Feed(s)
        self.gains = nn.Parameter(torch.ones(2, s.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gains[0] * self.attention(tf.rms_norm(x, x.shape[-1:]))
        return x + self.gains[1] * self.feed(tf.rms_norm(x, x.shape[-1:]))


class Network(nn.Module):
    def __init__(self, s: ModelSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = s
        self.embed = nn.Embedding(vocabulary, s.width)
        nn.init.normal_(self.embed.weight, std=0.01)
        self.stack = nn.ModuleList(Residual(s) for _ in range(s.depth))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = tf.rms_norm(self.embed(ids), (self.settings.width,))
        for part in self.stack:
            x = part(x)
        return tf.rms_norm(x, (self.settings.width,))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        raw = tf.linear(hidden, self.embed.weight.to(hidden.dtype)).float()
        return self.settings.cap * torch.tanh(raw / self.settings.cap)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids))


def surprisal(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """logits (..., V), goal (...) -> nats (...)"""
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, goal.unsqueeze(-1)).squeeze(-1)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: t.Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in filter(lambda q: q.grad is not None, group["params"]):
                memory = self.state[p].setdefault("memory", torch.zeros_like(p))
                memory.lerp_(p.grad, 0.05)
                u = p.grad.lerp(memory, 0.95).bfloat16()
                tall = u.size(0) > u.size(1)
                u = u.T if tall else u
                u = u / (u.norm() + 1e-7)
                for _ in range(5):
                    g = u @ u.T
                    u = 3.4445 * u + (-4.775 * g + 2.0315 * g @ g) @ u
                u = u.T if tall else u
                p.add_(u.to(p.dtype), alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


class Trainer:
    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        self.network = Network(settings.model, settings.data.vocabulary).to(world.device)
        matrices = [p for n, p in self.network.stack.named_parameters() if p.ndim == 2 and "gains" not in n]
        others = [self.network.embed.weight] + [p for n, p in self.network.stack.named_parameters() if "gains" in n]
        self.optimisers: t.List[torch.optim.Optimizer] = [
            Muon(matrices, settings.train.matrix_rate),
            torch.optim.AdamW(others, lr=settings.train.other_rate, betas=(0.9, 0.95)),
        ]
        self.rates = [o.param_groups[0]["lr"] for o in self.optimisers]
        self.average = AveragedModel(self.network)
        self.begun = 0.0

    def _fresh(self) -> t.Iterator[t.Tuple[torch.Tensor, torch.Tensor]]:
        s = self.settings
        return iter(Stream(s.data, self.world, s.model.context, s.train.batch))

    def _step(self, batch: t.Tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
        ids, goal = batch
        with torch.autocast("cuda", torch.bfloat16):
            objective = surprisal(self.compiled(ids), goal).mean()
        objective.backward()
        self.world.mean_gradients(self.network.parameters())
        for optimiser, rate in zip(self.optimisers, self.rates):
            optimiser.param_groups[0]["lr"] = rate * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return objective.detach()

    def _warm(self) -> None:
        """Compiles on real steps; then weights and moments are put back."""
        weights = {k: v.clone() for k, v in self.network.state_dict().items()}
        for batch in itertools.islice(self._fresh(), self.settings.train.warm_steps):
            self._step(batch, 0.0)
        self.network.load_state_dict(weights)
        for optimiser in self.optimisers:
            optimiser.state.clear()

    def _scale(self, share: float) -> float:
        return min(1.0, (1.0 - share) / self.settings.train.cooldown)

    @property
    def spent(self) -> float:
        torch.cuda.synchronize()
        return time.monotonic() - self.begun

    def run(self) -> Network:
        s = self.settings.train
        self.compiled = torch.compile(self.network)
        self._warm()
        self.begun = time.monotonic()
        for number, batch in enumerate(self._fresh()):
            share = (time.monotonic() - self.begun) / (s.seconds - s.reserve)
            if self.world.any(share >= 1.0):
                break
            value = self._step(batch, self._scale(share))
            if share > s.average_from:
                self.average.update_parameters(self.network)
            if number % 250 == 0:
                self.world.say(f"step {number} loss {value.item():.4f} at {self.spent:.1f} s")
        self.network.load_state_dict(self.average.module.state_dict())
        return self.network


class InputMoments:
    """Collects sum of x xT for each Linear through forward hooks."""

    def __init__(self, network: nn.Module) -> None:
        self.sums: t.Dict[str, torch.Tensor] = {}
        self.handles = [
            m.register_forward_pre_hook(functools.partial(self._hook, n))
            for n, m in network.named_modules()
            if isinstance(m, nn.Linear)
        ]

    def _hook(self, name: str, module: nn.Module, inputs: t.Tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        self.sums[name] = self.sums.get(name, 0) + x.T @ x

    def __enter__(self) -> "InputMoments":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


class Packer:
    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world

    def calibrate(self, network: Network, trainer: Trainer) -> t.Dict[str, torch.Tensor]:
        with InputMoments(network) as moments, torch.no_grad():
            for ids, _goal in itertools.islice(trainer._fresh(), 4):
                network(ids)
        if trainer.spent > self.settings.train.seconds:
            raise RuntimeError(f"{trainer.spent:.1f} s: training and calibration are over their time")
        return moments.sums

    @staticmethod
    def round_matrix(w: torch.Tensor, h: torch.Tensor) -> t.Tuple[torch.Tensor, torch.Tensor]:
        w = w.float().clone()
        h = h + 0.01 * h.diagonal().mean() * torch.eye(h.size(0), device=h.device)
        u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        scale = (w.std(1, keepdim=True) * 12.5 / 31).half().float()
        codes = torch.zeros_like(w)
        for j in range(w.size(1)):
            codes[:, j] = torch.clamp(torch.round(w[:, j] / scale[:, 0]), -31, 31)
            error = (w[:, j] - codes[:, j] * scale[:, 0]) / u[j, j]
            w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
        return codes.to(torch.int8), scale.half()

    def pack(self, network: Network, moments: t.Dict[str, torch.Tensor]) -> bytes:
        box: t.Dict[str, t.Any] = {}
        for name, tensor in network.state_dict().items():
            owner = name.removesuffix(".weight")
            if owner in moments:
                box[name] = tuple(x.cpu() for x in self.round_matrix(tensor, moments[owner]))
            else:
                box[name] = tensor.half().cpu()
        raw = io.BytesIO()
        torch.save(box, raw)
        return lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME)

    def write(self, blob: bytes) -> None:
        self.settings.artifact.write_bytes(blob)
        code = pathlib.Path(__file__).read_bytes()
        total = len(blob) + len(code)
        self.world.say(f"model {len(blob)} + code {len(code)} = {total} bytes, sha256 {hashlib.sha256(blob).hexdigest()}")
        if total > LIMIT_BYTES:
            raise RuntimeError(f"{total} bytes are over {LIMIT_BYTES}")

    def read(self) -> Network:
        box = torch.load(io.BytesIO(lzma.decompress(self.settings.artifact.read_bytes())), weights_only=True)
        weights = {k: v[0].float() * v[1].float() if isinstance(v, tuple) else v.float() for k, v in box.items()}
        network = Network(self.settings.model, self.settings.data.vocabulary)
        network.load_state_dict(weights)
        return network.to(self.world.device)


@dataclasses.dataclass
class Tally:
    nats: torch.Tensor
    tokens: torch.Tensor
    octets: torch.Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "Tally":
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(3)))

    def book(self, nats: torch.Tensor, octets: torch.Tensor) -> None:
        self.nats += nats.double().sum()
        self.tokens += nats.numel()
        self.octets += octets.sum()

    @property
    def loss(self) -> float:
        return (self.nats / self.tokens).item()

    @property
    def bits_per_byte(self) -> float:
        return (self.nats / LN2 / self.octets).item()


class Window(t.NamedTuple):
    begin: int
    first: int  # the first target that this window scores
    end: int

    @property
    def offset(self) -> int:
        return self.first - self.begin


def windows(total: int, context: int, stride: int) -> t.Iterator[Window]:
    yield Window(0, 0, min(context, total))
    for first in range(context, total, stride):
        end = min(first + stride, total)
        yield Window(end - context, first, end)


class Scorer(abc.ABC):
    """Prices the scored part of windows; may keep a state, which learns from what has been priced."""

    def __init__(self, network: Network, settings: EvalSettings) -> None:
        self.network, self.settings = network, settings

    @abc.abstractmethod
    def price(self, ids: torch.Tensor, goal: torch.Tensor, batch: t.Sequence[Window]) -> torch.Tensor:
        """(B, T) ids and targets -> (B, T) nats, of which the caller reads the scored part"""

    def learn(self, tokens: torch.Tensor) -> None:
        """tokens: just priced, in order"""


class PlainScorer(Scorer):
    @torch.inference_mode()
    def price(self, ids, goal, batch):
        return surprisal(self.network(ids), goal)


class SlotScorer(Scorer):
    """Each window has a delta of its own on the hidden states, fitted to that window's earlier positions alone."""

    def price(self, ids, goal, batch):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            hidden = self.network.hidden(ids).float()
        delta = torch.zeros(ids.size(0), 1, hidden.size(-1), device=ids.device, requires_grad=True)
        optimiser = torch.optim.AdamW([delta], lr=self.settings.slot_rate, betas=(0.3, 0.9))
        columns = torch.arange(ids.size(1), device=ids.device)
        context = columns[None] < torch.tensor([w.offset for w in batch], device=ids.device)[:, None]
        for _ in range(self.settings.slot_steps):
            nats = surprisal(self.network.head(hidden + delta), goal)
            objective = (nats * context).sum(1) / context.sum(1).clamp_min(1)
            optimiser.zero_grad()
            objective.sum().backward()
            optimiser.step()
        with torch.no_grad():
            return surprisal(self.network.head(hidden + delta), goal)


class OnlineScorer(PlainScorer):
    def __init__(self, network: Network, settings: EvalSettings, world: World) -> None:
        super().__init__(network, settings)
        self.world = world
        self.optimiser = torch.optim.SGD(network.parameters(), lr=settings.online_rate, momentum=0.9)

    def learn(self, tokens):
        context = self.network.settings.context
        rows = tokens.unfold(0, context + 1, context)
        for row in rows[self.world.rank :: self.world.size]:
            surprisal(self.network(row[None, :-1]), row[None, 1:]).mean().backward()
        self.world.mean_gradients(self.network.parameters())
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


class Evaluator:
    def __init__(self, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        self.ledger = ByteLedger(settings.data, world.device)
        parts = [Shard(path).tokens for path in settings.data.shards("val")]
        self.tokens = torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64))

    def _scorer(self, network: Network) -> Scorer:
        kind = self.settings.evaluate.adapt
        if kind is Adapt.NONE:
            return PlainScorer(network, self.settings.evaluate)
        if kind is Adapt.SLOT:
            return SlotScorer(network, self.settings.evaluate)
        return OnlineScorer(network, self.settings.evaluate, self.world)

    def _batches(self, some: t.Iterable[Window]) -> t.Iterator[t.List[Window]]:
        iterator = iter(some)
        while batch := list(itertools.islice(iterator, self.settings.evaluate.windows)):
            yield batch

    def _stack(self, batch: t.Sequence[Window]) -> t.Tuple[torch.Tensor, torch.Tensor]:
        longest = max(w.end - w.begin for w in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        goal = torch.zeros_like(ids)
        for i, w in enumerate(batch):
            ids[i, : w.end - w.begin] = self.tokens[w.begin : w.end]
            goal[i, : w.end - w.begin] = self.tokens[w.begin + 1 : w.end + 1]
        return ids.to(self.world.device), goal.to(self.world.device)

    def _score(self, scorer: Scorer, some: t.Iterable[Window], tally: Tally) -> None:
        for batch in self._batches(some):
            ids, goal = self._stack(batch)
            nats = scorer.price(ids, goal, batch)
            for i, w in enumerate(batch):
                cut = slice(w.offset, w.end - w.begin)
                tally.book(nats[i, cut], self.ledger.count(ids[i, cut], goal[i, cut]))

    def run(self, network: Network) -> Tally:
        s = self.settings.evaluate
        total = self.tokens.numel() - 1
        everything = list(windows(total, self.settings.model.context, s.stride))
        scorer, tally = self._scorer(network), Tally.empty(self.world.device)
        chunks = itertools.groupby(everything, key=lambda w: w.first // s.online_tokens)
        for number, group in chunks:
            group = list(group)
            self._score(scorer, group[self.world.rank :: self.world.size], tally)
            if group[-1].end < total:
                scorer.learn(self.tokens[group[0].first : group[-1].end + 1].to(self.world.device))
        self.world.total(tally.nats, tally.tokens, tally.octets)
        if int(tally.tokens.item()) != total:
            raise RuntimeError(f"{int(tally.tokens.item())} tokens scored of {total}")
        return tally


class Application:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.world = settings, World()
        torch.manual_seed(settings.seed)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        self.world.say(json.dumps(dataclasses.asdict(settings), default=str))

    def main(self) -> None:
        trainer, packer = Trainer(self.settings, self.world), Packer(self.settings, self.world)
        network = trainer.run()
        moments = packer.calibrate(network, trainer)
        if self.world.chief:
            packer.write(packer.pack(network, moments))
        self.world.wait()
        network = packer.read()
        begun = time.monotonic()
        tally = Evaluator(self.settings, self.world).run(network)
        self.report(tally, time.monotonic() - begun)

    def report(self, tally: Tally, seconds: float) -> None:
        self.world.say(f"final val_loss {tally.loss:.6f} val_bpb {tally.bits_per_byte:.6f} evaluation {seconds:.1f} s")
        if seconds > self.settings.evaluate.seconds:
            raise RuntimeError("evaluation took longer than allowed")


if __name__ == "__main__":
    Application(Settings.parse()).main()
