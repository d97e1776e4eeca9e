"""Hessians from different sources on the same weights: bits per byte after quantising by each, and their seconds.

    python bench/calibration.py RUN [--sequences 16] [--tokens 256]   # text, generated, random tokens; what RUN saw
    python bench/calibration.py RUN --cost [--rounds 6]                  # a training step with and without online

RUN: a finished run's folder, which is read only. The score is that of plain windows on the held-out text, under the
run's own plan; nothing is chosen by it here. Seconds are one thread's CPU time for --cost, which other work on the
machine moves little, and wall clock otherwise.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairway import recipe as recipes
from fairway import steps
from fairway.artifact import open_artifact
from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.devices import choose, generator
from fairway.base.journal import Run
from fairway.data import batches, build_tokenizer, open_corpus, tokenize
from fairway.model import GPT, build_model
from fairway.quant import Hessians, dequantized, gather, observed, quantize, read_hessians
from fairway.quant.calibration import generated, online
from fairway.score import Ledger
from fairway.score.evaluate import model_on, score_model, stream_of
from fairway.train import ScheduleSpec, pretrain


class Bench:
    """A run's weights, plan and text."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, recipes.load(str(folder / steps.RECIPE))
        data = self.recipe.data
        corpus, held_out = open_corpus(data, "train"), open_corpus(data, data.held_out)
        self.tokenizer = build_tokenizer(data, corpus)
        self.train = tokenize(corpus, self.tokenizer, data.lossy, Run())
        self.tokens = np.asarray(tokenize(held_out, self.tokenizer, data.lossy, Run()).tokens)
        self.bytes = int(self.tokenizer.byte_lengths(self.tokens[1:], self.tokens[:-1]).sum())
        self.model = model_on(open_artifact(folder / steps.WEIGHTS), choose("cpu"))
        self.names = observed(self.model, self.recipe.quant)

    def score(self, model: GPT) -> float:
        """Bits per byte in plain windows."""
        one, targets = self.recipe, len(self.tokens) - 1
        stream = stream_of("quantized", targets, one.score, one.model.context)
        nats = score_model(model, self.tokens, stream, one.score, "quantized", self.tokenizer.size, Ledger(targets))
        return nats / math.log(2) / self.bytes

    def quantised(self, hessians: Hessians) -> float:
        model = copy.deepcopy(self.model)
        model.load_state_dict(dequantized(quantize(self.model, hessians, self.recipe.quant, Run())))
        return self.score(model)

    def windows(self, sequences: int) -> Iterator[Tensor]:
        context = self.recipe.model.context
        order = slots.technique("fairway.data.loaders", "sequential").Spec()
        rows = batches(self.train, order, sequences * context, context, 0).batch(0)[0]
        yield from rows.split(self.recipe.quant.calibration_batch)

    def random(self, sequences: int, tokens: int) -> Iterator[Tensor]:
        chance = generator(self.recipe.seed, "random")
        yield from torch.randint(0, self.model.vocab, (sequences, tokens), generator=chance).split(8)


def sources(bench: Bench, sequences: int, tokens: int, seeds: list[int]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [{"source": "float weights", "bits_per_byte": bench.score(bench.model)}]
    print(json.dumps(rows[-1]), flush=True)

    def row(name: str, hessians: Hessians, **seconds: float) -> None:
        rows.append({"source": name, "bits_per_byte": bench.quantised(hessians), **seconds})
        print(json.dumps(rows[-1]), flush=True)

    for count in (bench.recipe.quant.calibration_sequences, sequences):
        with Stopwatch() as watch:
            found = gather(bench.model, bench.windows(count), bench.names)
        row(f"text {count} x {bench.recipe.model.context}", found, seconds=round(watch.seconds, 2))
    for seed in seeds:
        quant, run = replace(bench.recipe.quant, calibration=generated.Spec(sequences, tokens)), Run()
        found = generated.hessians(quant, bench.model, bench.names, (), run, seed)
        row(f"generated {sequences} x {tokens}, seed {seed}", found, **run.facts["generated"])
    with Stopwatch() as watch:
        found = gather(bench.model, bench.random(sequences, tokens), bench.names)
    row(f"random tokens {sequences} x {tokens}", found, seconds=round(watch.seconds, 2))
    row("none (identity)", {name: torch.eye(len(hessian)) for name, hessian in found.items()})
    if (bench.folder / online.OBSERVED).exists():
        row("online", read_hessians(bench.folder / online.OBSERVED))
    return rows


def cost(bench: Bench, rounds: int) -> dict[str, object]:
    """Rounds of `every` steps with one gathering and without, in turns, from the same weights."""
    one, seconds = bench.recipe, {False: list[float](), True: list[float]()}
    every = online.Spec().every
    schedule = ScheduleSpec(steps=every)
    spec = replace(one.train, schedule=schedule, warmup_steps=0, checkpoint_seconds=0.0)
    made = batches(bench.train, one.data.loader, one.train.batch_tokens, one.model.context, one.seed)
    for _ in range(rounds):
        for looks in (False, True):
            model, run = build_model(one.model, bench.tokenizer.size, one.seed), Run()
            quant = replace(one.quant, calibration=online.Spec(start_scale=1.0))
            observer = online.observer(quant, model, bench.names, run) if looks else None
            began = time.process_time()
            pretrain(model, made, spec, run, choose("cpu"), one.seed, observer=observer)
            seconds[looks].append(time.process_time() - began)
    plain, watched = (1000 * statistics.median(seconds[looks]) / every for looks in (False, True))
    ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    return {
        "step_milliseconds": round(plain, 2),
        "with_online_milliseconds": round(watched, 2),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path)
    options.add_argument("--sequences", type=int, default=16)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--seeds", default="1337,42,2025", help="of the text that the model writes")
    options.add_argument("--cost", action="store_true")
    options.add_argument("--rounds", type=int, default=6)
    given = options.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.run)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found = cost(bench, given.rounds) if given.cost else sources(bench, given.sequences, given.tokens, seeds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
