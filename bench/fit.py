"""Fits to byte budgets, seed by seed, beside the hand-tuned way: how close, how fast, and at what damage.

    python bench/fit.py RUN... [--budgets 250000,500000,1000000] [--coder brotli] [--targets 0] [--alone]

Every RUN is a folder with weights and Hessians. `fit` finds a plan for each budget. The hand-tuned way is the reference
study's: the recipe's own grids, the smallest weights pruned before rounding, 1 % more and more until the file fits (no
pruning where it fits at once). Damage is the fit's own measure, nats per token, for both; with --targets also the loss
on so many tokens of the held-out text, in plain windows, which neither has seen.
"""

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fairway.artifact import open_artifact, seal
from fairway.artifact.squeeze import squeeze
from fairway.base.journal import Run
from fairway.data import open_corpus, tokenize
from fairway.quant import PruneSpec, QuantSpec, dequantized, quantize
from fairway.quant.observe import read_hessians
from fairway.recipe import Recipe
from fairway.score import Ledger
from fairway.score.evaluate import score_model, stream_of
from fairway.steps.fitting import Subject, fit_to
from fairway.steps.products import HESSIANS, WEIGHTS, decoder_share
from fairway.verbs.opening import recipe_of

PERCENT = (0, 1, 2, 3, 5, 7, 10, *range(15, 100, 5))


class Bench:
    """One run's weights, and what is measured on them."""

    def __init__(self, folder: Path, coder: str, targets: int) -> None:
        self.recipe: Recipe = recipe_of(folder, (f"pack.coder={coder}",))
        self.opened = open_artifact(folder / WEIGHTS)
        self.model, self.hessians, self.quiet = self.opened.model(), read_hessians(folder / HESSIANS), Run(quiet=True)
        self.subject = Subject.of(self.model, self.recipe.quant, self.hessians, self.quiet)
        self.place = Path(tempfile.mkdtemp()) / "artifact.fw"
        self.tokens = None
        if targets:
            corpus = open_corpus(self.recipe.data, self.recipe.data.held_out)
            held_out = tokenize(corpus, self.opened.tokenizer, self.recipe.data.lossy, self.quiet)
            self.tokens = np.asarray(held_out.tokens[: targets + 1])

    def write(self, tensors):
        tokenizer = self.opened.tokenizer
        share = decoder_share(self.recipe)
        return seal(self.place, tensors, self.recipe.model, tokenizer.size, tokenizer, share, self.recipe.pack)

    def damage(self, tensors) -> float:
        return sum(one.damage for one in self.subject._solutions(tensors).values())

    def loss(self, tensors) -> float | None:
        """Bits per byte of the held-out tokens."""
        if self.tokens is None:
            return None
        model = copy.deepcopy(self.model)
        model.load_state_dict(dequantized(tensors))
        targets = len(self.tokens) - 1
        stream = stream_of("quantized", targets, self.recipe.score, self.recipe.model.context)
        size = int(self.opened.tokenizer.byte_lengths(self.tokens[1:], self.tokens[:-1]).sum())
        ledger = Ledger(targets)
        vocab = self.opened.vocab
        nats = score_model(model.eval(), self.tokens, stream, self.recipe.score, "quantized", vocab, ledger)
        return nats / np.log(2) / size

    def fitted(self, budget: int):
        blob = len(squeeze(self.opened.tokenizer.model))
        return fit_to(self.subject, budget, blob, self.write, self.quiet)

    def by_hand(self, budget: int):
        """(percent, bytes, tensors) of the least pruning that fits, bisected; None where none does."""
        low, high, best = 0, len(PERCENT), None
        while low < high:
            middle = 0 if best is None and low == 0 and high == len(PERCENT) else (low + high) // 2
            percent = PERCENT[middle]
            prune = PruneSpec("before", percent / 100) if percent else PruneSpec()
            spec: QuantSpec = replace(self.recipe.quant, prune=prune)
            tensors = quantize(self.model, self.hessians, spec, self.quiet)
            size = self.write(tensors).bytes
            if size <= budget:
                best, high = (percent, size, tensors), middle
            else:
                low = middle + 1
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--budgets", default="250000,500000,1000000")
    parser.add_argument("--coder", default="brotli")
    parser.add_argument("--targets", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="the fits alone, nothing by hand")
    chosen = parser.parse_args()
    drawn = Table(box=None, pad_edge=False)
    titles = ("run", "budget", "bytes", "of it", "damage", "bpb", "s", "written", "by hand", "bytes", "damage", "bpb")
    for title in titles:
        drawn.add_column(title, justify="left" if title == "run" else "right")
    for folder in chosen.runs:
        bench = Bench(folder, chosen.coder, chosen.targets)
        for budget in map(int, chosen.budgets.split(",")):
            fit = bench.fitted(budget)
            found, loss = fit.found, bench.loss(fit.tensors)
            row = [folder.name, f"{budget:,}", f"{found.bytes:,}", f"{found.bytes / budget:.2%}"]
            row += [f"{found.damage:.5f}", _shown(loss), f"{fit.seconds:.1f}", str(found.writings)]
            hand = None if chosen.alone else bench.by_hand(budget)
            if hand is None:
                row += ["-", "", "", ""]
            else:
                percent, size, tensors = hand
                row += [f"{percent} %", f"{size:,}", f"{bench.damage(tensors):.5f}", _shown(bench.loss(tensors))]
            drawn.add_row(*row)
            print(*row, sep="  ", flush=True)
    Console(width=160).print(drawn)


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    main()
