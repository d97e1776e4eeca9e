"""A lightning-like harness: a module with hooks, a loop that calls them, callbacks that listen."""
from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator

import brotli
import numpy as np
import sentencepiece as spm
import torch
from torch import nn
from torch.nn import functional as fn


@dataclass
class Config:
    root: Path = Path("data")
    tokenizer: Path = Path("tok.model")
    vocab: int = 1024
    width: int = 448
    layers: int = 9
    context: int = 1024
    seconds: float = 585.0
    lr: float = 8e-4
    online_lr: float = 1e-3
    online_steps: int = 2
    seed: int = 0

    @classmethod
    def from_args(cls) -> "Config":
        parser = argparse.ArgumentParser()
        for name, default in vars(cls()).items():
            parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
        return cls(**vars(parser.parse_args()))


class Corpus:
    def __init__(self, cfg: Config, split: str):
        self.paths = sorted(cfg.root.glob(f"fineweb_{split}_*.bin"))
        assert self.paths, f"no {split} shards in {cfg.root}"

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self.paths:
            with path.open("rb") as handle:
                head = np.frombuffer(handle.read(1024), "<i4")
                yield np.frombuffer(handle.read(2 * int(head[2])), "<u2")

    def whole(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(self)).astype(np.int64))


class Layer(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(w, 3 * w, False), nn.Linear(w, 4 * w, False), nn.Linear(4 * w, w, False)
        self.back = nn.Linear(w, w, False)

    def forward(self, x):
        q, k, v = self.mix(fn.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, 7, -1)).permute(2, 0, 3, 1, 4)
        a = fn.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(a.transpose(1, 2).flatten(2))
        return x + self.down(fn.gelu(self.up(fn.rms_norm(x, x.shape[-1:]))))


class Module(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.table = nn.Embedding(cfg.vocab, cfg.width)
        self.position = nn.Embedding(cfg.context, cfg.width)
        self.layers = nn.Sequential(*[Layer(cfg.width) for _ in range(cfg.layers)])

    def forward(self, ids):
        x = self.table(ids) + self.position.weight[: ids.shape[1]]
        return fn.linear(fn.rms_norm(self.layers(x), (self.cfg.width,)), self.table.weight)

    def token_losses(self, batch):
        ids, goal = batch
        return fn.cross_entropy(self(ids).transpose(1, 2).float(), goal, reduction="none")

    def training_step(self, batch):
        return self.token_losses(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.cfg.lr, betas=(0.9, 0.95), weight_decay=0.1)


class ByteCounter:
    def __init__(self, cfg: Config, device):
        sp = spm.SentencePieceProcessor(model_file=str(cfg.tokenizer))
        rows = [self.measure(sp, i) for i in range(cfg.vocab)]
        self.size, self.space, self.silent = (torch.tensor(col, device=device) for col in zip(*rows))

    @staticmethod
    def measure(sp, i):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            return 0, False, True
        if sp.is_byte(i):
            return 1, False, False
        piece = sp.id_to_piece(i)
        return len(piece.removeprefix("▁").encode("utf-8")), piece.startswith("▁"), False

    def __call__(self, ids, goal) -> float:
        return float((self.size[goal] + (self.space[goal] & ~self.silent[ids])).sum())


@dataclass
class Meter:
    nats: float = 0.0
    tokens: int = 0
    octets: float = 0.0
    watchers: list[Callable] = field(default_factory=list)

    def book(self, losses, octets):
        self.nats += losses.double().sum().item()
        self.tokens += losses.numel()
        self.octets += octets
        for watcher in self.watchers:
            watcher(self)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / self.octets


class Loop:
    def __init__(self, cfg: Config):
        self.cfg, self.device = cfg, torch.device("cuda")
        torch.manual_seed(cfg.seed)

    def train_batches(self) -> Iterator:
        n = 96 * self.cfg.context
        while True:
            for shard in Corpus(self.cfg, "train"):
                for at in range(0, len(shard) - n - 1, n):
                    ids = torch.from_numpy(shard[at : at + n + 1].astype(np.int64)).to(self.device)
                    yield ids[:-1].view(96, -1), ids[1:].view(96, -1)

    def fit(self, module: Module) -> None:
        optimizer, began = module.configure_optimizers(), time.perf_counter()
        for batch in self.train_batches():
            spent = time.perf_counter() - began
            if spent >= self.cfg.seconds:
                return
            optimizer.param_groups[0]["lr"] = self.cfg.lr * min(1.0, 2 * (1 - spent / self.cfg.seconds))
            optimizer.zero_grad()
            module.training_step(batch).backward()
            optimizer.step()

    def validation_batches(self) -> Iterable:
        stream = Corpus(self.cfg, "val").whole()
        c = self.cfg.context
        total = (len(stream) - 1) // c * c
        for at in range(0, total, 16 * c):
            ids = stream[at : min(at + 16 * c, total) + 1].to(self.device)
            yield ids[:-1].view(-1, c), ids[1:].view(-1, c)

    def test(self, module: Module, counter: ByteCounter) -> Meter:
        meter = Meter()
        self.online = torch.optim.SGD(module.layers[-2:].parameters(), lr=self.cfg.online_lr)
        for batch in self.validation_batches():
            self.score_step(module, batch, meter, counter)
            self.learn_step(module, batch)
        return meter

    def score_step(self, module, batch, meter, counter):
        with torch.no_grad():
            meter.book(module.token_losses(batch), counter(*batch))

    def learn_step(self, module, batch):
        for _ in range(self.cfg.online_steps):
            self.online.zero_grad()
            module.training_step(batch).backward()
            self.online.step()


class Store:
    path = Path("model.br")

    @classmethod
    def save(cls, module: nn.Module) -> int:
        raw = io.BytesIO()
        torch.save({k: v.half().cpu() for k, v in module.state_dict().items()}, raw)
        return cls.path.write_bytes(brotli.compress(raw.getvalue(), quality=11))

    @classmethod
    def load(cls, module: nn.Module) -> None:
        module.load_state_dict(torch.load(io.BytesIO(brotli.decompress(cls.path.read_bytes()))))


if __name__ == "__main__":
    config = Config.from_args()
    loop = Loop(config)
    model = Module(config).to(loop.device)
    loop.fit(model)
    weight = Store.save(model) + Path(__file__).stat().st_size
    print(f"total bytes {weight}")
    if weight > 16_000_000:
        raise SystemExit("too large")
    Store.load(model)
    start = time.perf_counter()
    result = loop.test(model, ByteCounter(config, loop.device))
    print(f"val_loss={result.nats / result.tokens:.6f} val_bpb={result.bpb:.6f} eval_s={time.perf_counter() - start:.1f}")
