"""Small scripts of our own for the rules of order: a base with places to fill in, and the audit of a text."""

import ast
import functools
from pathlib import Path

from fairway.audit.case import Case
from fairway.audit.flow.events import Trace
from fairway.audit.flow.machine import run
from fairway.audit.passes.charged import passes_of
from fairway.audit.reading.script import Script
from fairway.audit.rules import (
    calibration_after_cap,
    calibration_on_validation,
    choice_by_validation,
    min_over_passes,
    multi_epoch_last,
    rescoring_after_adaptation,
    slot_on_scored,
    slot_shared_delta,
    subset_as_full,
    temperature_from_validation,
    training_before_scoring,
    twice_counted_tokens,
    two_pass_cache,
    validation_in_training,
)
from fairway.audit.settings import Settings
from fairway.audit.submission import Submission
from fairway.audit.verdict import Finding

RULES = (
    calibration_after_cap, calibration_on_validation, choice_by_validation, min_over_passes, multi_epoch_last,
    rescoring_after_adaptation, slot_on_scored, slot_shared_delta, subset_as_full, temperature_from_validation,
    training_before_scoring, twice_counted_tokens, two_pass_cache, validation_in_training,
)  # fmt: skip

HEAD = """
import copy, functools, glob, io, math, os, time, zlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

class Hyperparameters:
    train_files = os.environ.get("TRAIN_FILES", "./data/shards_train_*.bin")
    val_files = os.environ.get("VAL_FILES", "./data/shards_val_*.bin")
    seq_len = int(os.environ.get("SEQ_LEN", 1024))
    stride = int(os.environ.get("STRIDE", 64))
    chunk = int(os.environ.get("CHUNK", 32768))
    epochs = int(os.environ.get("EPOCHS", 3))
    cap = float(os.environ.get("CAP", 600.0))
    reserve = float(os.environ.get("RESERVE", 12.0))
    flag = bool(int(os.environ.get("FLAG", "0")))

def shard(path):
    head = np.fromfile(path, dtype="<i4", count=256)
    return torch.from_numpy(np.fromfile(path, dtype="<u2", count=int(head[2]), offset=1024).astype(np.int64))

def load(pattern):
    return torch.cat([shard(p) for p in sorted(glob.glob(pattern))])

class Loader:
    def __init__(self, pattern):
        self.files = sorted(glob.glob(pattern))
        self.at, self.pos, self.tokens = 0, 0, shard(self.files[0])
    def next(self, n):
        if self.pos + n + 1 > self.tokens.numel():
            self.at = (self.at + 1) % len(self.files)
            self.tokens, self.pos = shard(self.files[self.at]), 0
        part = self.tokens[self.pos : self.pos + n + 1]
        self.pos += n
        return part[:-1].view(-1, 1024), part[1:].view(-1, 1024)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(1024, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
        self.head = nn.Linear(64, 1024, bias=False)
        self.temperature = 1.0
    def hidden(self, x):
        h = self.emb(x)
        for block in self.blocks:
            h = h + F.relu(block(h))
        return h
    def forward_logits(self, x):
        return self.head(self.hidden(x))
    def forward(self, x, y):
        logits = self.forward_logits(x)
        return F.cross_entropy(logits.view(-1, 1024).float(), y.reshape(-1))

def train(args, model):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = Loader(args.train_files)
    initial = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for _ in range(20):
        x, y = loader.next(65536)
        model(x, y).backward()
        opt.step()
        opt.zero_grad()
    model.load_state_dict(initial)
    loader = Loader(args.train_files)
    ema = {k: v.detach().float().clone() for k, v in model.state_dict().items()}
    t0 = time.perf_counter()
    step = 0
    while True:
        elapsed = time.perf_counter() - t0
        if elapsed >= args.cap - args.reserve:
            break
        x, y = loader.next(65536)
        loss = model(x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].mul_(0.997).add_(v.detach().float(), alpha=0.003)
        step += 1
        if step % 500 == 0:
            print(f"step:{step} train_loss:{loss.item():.4f}")
    model.load_state_dict(ema)

def eval_val(args, model, val):
    total, count = torch.zeros(()), 0
    with torch.inference_mode():
        for i in range(0, val.numel() - 1, 65536):
            x = val[i : i + 65536].view(-1, 1024)
            y = val[i + 1 : i + 65537].view(-1, 1024)
            total += model(x, y).detach() * y.numel()
            count += y.numel()
    return (total / count).item()

def eval_ttt(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = torch.zeros((), dtype=torch.float64), 0
    n = (val.numel() - 1 + args.chunk - 1) // args.chunk
    for ci in range(n):
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        model.eval()
        with torch.inference_mode():
            logits = model.forward_logits(val[start:end][None])
            nll = F.cross_entropy(logits.view(-1, 1024), val[start + 1 : end + 1], reduction="none")
            total += nll.double().sum()
            count += end - start
        if ci < n - 1:
            model.train()
            for _epoch in range(args.epochs):
                for s in range(start, end, args.seq_len):
                    loss = model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None])
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
    return (total / count).item()
"""

MAIN = """
def main():
    args = Hyperparameters()
    model = GPT().cuda()
    train(args, model)
    val = load(args.val_files)
    print(f"plain val_loss:{eval_val(args, model, val):.4f}")
    final = eval_ttt(args, model, val)
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")

if __name__ == "__main__":
    main()
"""

HONEST = HEAD + MAIN


@functools.lru_cache(maxsize=4)  # what a test asks again it asks at once; each holds some megabytes
def case_of(text: str, settings: tuple[tuple[str, str], ...] = ()) -> Case:
    script = Script("train_gpt.py", text, ast.parse(text))
    readme = (
        "    " + " ".join(f"{name}={value}" for name, value in settings) + " torchrun train_gpt.py\n"
        if settings
        else ""
    )
    return Case(Submission(Path("."), "ours", script, (script,), {}, {}, {}, readme))


def findings(text: str, **settings: str) -> dict[str, Finding]:
    """The findings of all rules of order, by id."""
    case = case_of(text, tuple(settings.items()))
    return {rule.ID: rule.check(case) for rule in RULES}


def broken(text: str, **settings: str) -> set[str]:
    """The rules that a script violates."""
    return {name for name, finding in findings(text, **settings).items() if finding.verdict == "violates"}


def doubted(text: str, **settings: str) -> set[str]:
    """The rules that a script does not keep cleanly."""
    return {name for name, finding in findings(text, **settings).items() if finding.verdict != "clean"}


def line_of(text: str, piece: str) -> int:
    """The line in which a piece of text stands first."""
    return text[: text.index(piece)].count("\n") + 1


def trace_of(text: str, fuel: int = 500_000) -> Trace:
    """The trace of a script of no submission."""
    return run(Script("x.py", text, ast.parse(text)), Settings(), fuel)


__all__ = ["HEAD", "HONEST", "MAIN", "broken", "case_of", "doubted", "findings", "line_of", "passes_of", "trace_of"]
