"""Quantisers side by side on one trained model: bytes, damage, bits per byte.

    python bench/quantizers.py RUN [--targets 30000]

RUN is a run folder with weights.safetensors and hessians.safetensors. Every row quantises the same weights with the
same Hessians, seals a file, and scores the beginning of the run's held-out text in plain windows. `b6` is the reference
study's way, with every matrix quantised (it leaves those of at most 65,536 elements in float16, in a small model all);
below it stand repairs, two of them at b6's bytes: their clip is bisected until the file weighs the same.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fairway import steps
from fairway.artifact import open_artifact, seal
from fairway.base import recipes
from fairway.base.journal import Run
from fairway.data import Tokens, open_corpus, tokenize
from fairway.quant import GridSpec, PruneSpec, QuantSpec, ScaleSpec, quantize
from fairway.quant.observe import read_hessians
from fairway.quant.rounding import ascending_plain, gptq, nearest
from fairway.recipe import Recipe
from fairway.score import evaluate

INT8 = GridSpec(8, ScaleSpec("fixed"))
B6 = QuantSpec(
    matrix=GridSpec(5, ScaleSpec("percentile", floor=1.0)),
    table=INT8,
    rounding=ascending_plain.Spec(),
    prune=PruneSpec("before", 0.10),
)


def sdclip(k: float) -> QuantSpec:
    """The same tables and bits; each row's clip is k of its standard deviations."""
    return QuantSpec(matrix=GridSpec(5, ScaleSpec("sdclip", k=k)), table=INT8, rounding=gptq.Spec())


def absolute(floor: float) -> QuantSpec:
    """The same tables and bits; one step for all rows whose own clip is below the floor, nothing pruned."""
    return QuantSpec(matrix=GridSpec(5, ScaleSpec("percentile", floor=floor)), table=INT8, rounding=gptq.Spec())


class Bench:
    def __init__(self, folder: Path, targets: int) -> None:
        self.recipe = recipes.load(Recipe, folder / steps.RECIPE)
        self.weights = open_artifact(folder / steps.WEIGHTS)
        self.model = self.weights.model()
        self.hessians = read_hessians(folder / steps.HESSIANS)
        held_out = open_corpus(self.recipe.data, self.recipe.data.held_out)
        tokens = tokenize(held_out, self.weights.tokenizer).tokens[: targets + 1]
        text = self.weights.tokenizer.decode(tokens[1:], previous=int(tokens[0]))
        self.text = Tokens.of(tokens, held_out.split, text)
        self.scratch = Path(tempfile.mkdtemp())

    def file(self, spec: QuantSpec) -> tuple[Path, Run]:
        run = Run()
        integers = quantize(self.model, (), spec, run, self.hessians)
        path = self.scratch / "artifact.fw"
        tokenizer = self.weights.tokenizer
        seal(path, integers, self.recipe.model, tokenizer.size, tokenizer, {}, self.recipe.pack)
        return path, run

    def score(self, path: Path) -> float:
        return evaluate(path, self.text, self.recipe.score, Run(), "quantized").bits_per_byte

    def row(self, name: str, spec: QuantSpec, base: float) -> int:
        path, run = self.file(spec)
        facts = [fact for key, fact in run.facts.items() if key.startswith("quant.") and "objective" in fact]
        worse = sum(fact["objective"] > fact["objective_nearest"] for fact in facts)
        ratio = run.facts["quant"]["objective"] / max(run.facts["quant"]["objective_nearest"], 1e-30)
        size, bpb = path.stat().st_size, self.score(path)
        against = f"{ratio:9.3f}  {worse:3d} of {len(facts)}" if facts else "        -          -"
        print(f"{name:<34}{size:>10,}{bpb:>9.4f}{bpb - base:>+9.4f}  {against}", flush=True)
        return size

    def fitted(self, way: Callable[[float], QuantSpec], size: int) -> float:
        """The value at which a file weighs at most `size`: a wider clip gives fewer distinct codes, so fewer bytes."""
        low, high = 0.1, 60.0
        for _ in range(11):
            value = (low * high) ** 0.5
            low, high = (value, high) if self.file(way(value))[0].stat().st_size > size else (low, value)
        return high


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--targets", type=int, default=30_000)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    bench = Bench(chosen.run, chosen.targets)
    base = bench.score(chosen.run / steps.WEIGHTS)
    print(f"float {base:.4f} bits per byte on {bench.text.text_bytes:,} bytes")
    print(f"{'':<34}{'bytes':>10}{'bpb':>9}{'loss':>9}  objective against nearest, matrices worse")
    for bits in (4, 5):
        for solver in (nearest.Spec(), ascending_plain.Spec(), gptq.Spec()):
            spec = replace(bench.recipe.quant, matrix=GridSpec(bits), rounding=solver)
            bench.row(f"int{bits} percentile, {type(solver).__module__.rsplit('.', 1)[-1]}", spec, base)
    bench.row("b6, small matrices in float16", replace(B6, passthrough_elements=65_536), base)
    size = bench.row("b6", B6, base)
    bench.row("b6 with reference GPTQ", replace(B6, rounding=gptq.Spec()), base)
    bench.row("b6 without pruning", replace(B6, prune=PruneSpec("never")), base)
    for name, way in (("sdclip", sdclip), ("absolute", absolute)):
        value = bench.fitted(way, size)
        bench.row(f"gptq, {name} {value:.2f} at b6's bytes", way(value), base)


if __name__ == "__main__":
    main()
