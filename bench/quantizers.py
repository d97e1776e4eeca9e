"""Quantisers side by side on one trained model: bytes, damage, bits per byte.

    python bench/quantizers.py RUN [--bytes 500000] [--targets 30000] [--only scales,prune]

RUN is a run folder with weights.safetensors and hessians.safetensors. Every row quantises the same weights with the
same Hessians, seals a file, opens it, and prices the beginning of the run's held-out text and of its training text in
plain windows. "objective" is Σ tr(E H Eᵀ) over the matrices with a Hessian; tensors differ in what a unit of it costs.
"Δ" is the difference of held-out bits per byte to the section's first row, token by token, ± its standard error over
windows: what another text of this kind might say, not what another seed would.

In the sections that compare at equal bytes, one number k widens or narrows the step of every tensor until the file
weighs what `--bytes` says (within 0.1 %). `study` is the reference study's way, every matrix quantised.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fairway import steps
from fairway.artifact import PackSpec, open_artifact, seal
from fairway.base import recipes, slots, specs
from fairway.base.clock import Stopwatch
from fairway.base.journal import Run
from fairway.data import Tokens, open_corpus, tokenize
from fairway.quant import GridSpec, Override, PruneSpec, QuantSpec, RepairSpec, ScaleSpec, quantize
from fairway.quant.grid import largest
from fairway.quant.observe import read_hessians
from fairway.quant.parallel import side_by_side
from fairway.quant.plan import Form
from fairway.quant.rounding import ascending_plain, gptq, nearest
from fairway.quant.scales import row_scales
from fairway.recipe import Recipe
from fairway.score.evaluate import score_model, stream_of
from fairway.score.ledger import Ledger

INT8 = GridSpec(8, ScaleSpec("fixed"))
STUDY = QuantSpec(
    matrix=GridSpec(5, ScaleSpec("percentile", floor=1.0)),
    table=INT8,
    rounding=ascending_plain.Spec(),
    prune=PruneSpec("before", 0.10),
)
FORMS: tuple[Form, ...] = ("steps", "lloyd_max", "rotated", "turbo")
WIDE = 7  # bits: at the steps of a few bits a weight no code comes near the clip of int7
Way = Callable[[float], QuantSpec]


@dataclass(frozen=True)
class Row:
    """What one quantiser gave; prices in nats, of every target of the two texts."""

    bytes: int
    objective: float
    held_out: npt.NDArray[np.float64]
    training: npt.NDArray[np.float64]


class Bench:
    def __init__(self, folder: Path, targets: int, budget: int, coder: str) -> None:
        self.recipe = recipes.load(Recipe, folder / steps.RECIPE)
        self.weights = open_artifact(folder / steps.WEIGHTS)
        self.model = self.weights.model()
        self.hessians = read_hessians(folder / steps.HESSIANS)
        self.texts = [self._text(split, targets) for split in (self.recipe.data.held_out, "train")]
        self.path = Path(tempfile.mkdtemp()) / "artifact.fw"
        self.packing, self.budget = specs.build(PackSpec, {"coder": coder}), budget
        self.float = self.first = Row(0, 0.0, *self._prices(folder / steps.WEIGHTS))

    def _text(self, split: Any, targets: int) -> Tokens:
        """The beginning of a split, as tokens."""
        tokens = tokenize(open_corpus(self.recipe.data, split), self.weights.tokenizer).read(0, targets + 1)
        return Tokens.of(tokens, split, self.weights.tokenizer.decode(tokens[1:], previous=int(tokens[0])))

    def file(self, spec: QuantSpec) -> tuple[int, Run]:
        """Quantises and seals; the file's bytes and the facts."""
        run, tokenizer = Run(), self.weights.tokenizer
        tensors = quantize(self.model, self.hessians, spec, run)
        return seal(self.path, tensors, self.recipe.model, tokenizer.size, tokenizer, {}, self.packing).bytes, run

    def _prices(self, path: Path) -> list[npt.NDArray[np.float64]]:
        artifact, found = open_artifact(path), []
        model, score = artifact.model(), self.recipe.score
        for text in self.texts:
            ledger = Ledger(len(text) - 1)
            stream = stream_of("quantized", len(ledger), score, self.recipe.model.context)
            score_model(model, text.tokens, stream, score, "quantized", artifact.vocab, ledger)
            found.append(np.asarray(ledger.price(slice(None)), np.float64))
        return found

    def row(self, name: str, spec: QuantSpec, first: bool = False) -> int:
        """One line of a table; the file's bytes. first: the line that the section's others are compared with."""
        size, run = self.file(spec)
        row = Row(size, run.facts["quant"]["objective"], *self._prices(self.path))
        self.first = row if first else self.first
        held_out, training = (
            float(prices.sum()) / math.log(2) / text.text_bytes
            for prices, text in zip((row.held_out, row.training), self.texts, strict=True)
        )
        difference, spread = self._paired(row)
        told = "            first" if first else f"{difference:+.4f} ± {spread:.4f}"
        print(f"{name:<50}{size:>10,}{row.objective:>11.4g}{held_out:>9.4f}{told:>19}{training:>10.4f}", flush=True)
        return size

    def _paired(self, row: Row) -> tuple[float, float]:
        """Held-out bits per byte against the first row, and the standard error over windows."""
        windows = max(len(row.held_out) // self.recipe.model.context, 1)
        parts = np.array([part.sum() for part in np.array_split(row.held_out - self.first.held_out, windows)])
        unit = math.log(2) * self.texts[0].text_bytes
        return float(parts.sum() / unit), float(parts.std() * math.sqrt(windows) / unit)

    def fitted(self, way: Way, size: int) -> tuple[float, QuantSpec]:
        """The k whose file weighs `size` within 0.1 %, by secants of log bytes over log k."""
        low, high = math.log(2.0), math.log(400.0)
        bytes_low, bytes_high = (math.log(self.file(way(math.exp(x)))[0]) for x in (low, high))
        for step in range(12):
            share = (bytes_low - math.log(size)) / (bytes_low - bytes_high)
            middle = low + (high - low) * (min(max(share, 0.03), 0.97) if step % 3 else 0.5)
            found = self.file(way(math.exp(middle)))[0]
            if abs(found - size) <= 0.001 * size:
                break
            if found > size:
                low, bytes_low = middle, math.log(found)
            else:
                high, bytes_high = middle, math.log(found)
        return math.exp(middle), way(math.exp(middle))

    def rows(self, ways: dict[str, Way], size: int) -> None:
        """A line for each way at these bytes, the first one being what the others are compared with."""
        for i, (name, way) in enumerate(ways.items()):
            k, spec = self.fitted(way, size)
            self.row(f"{name}, step {k / largest(WIDE):.2f} σ", spec, first=i == 0)


def wide(rule: Any = "absolute", solver: Any = gptq.Spec(), bits: int = WIDE, **changes: Any) -> Way:  # noqa: B008
    """One k for all tensors, the tied embedding solved with the head's Hessian."""

    def way(k: float) -> QuantSpec:
        weight = changes.get("hessian_weight", 0.0)
        scale, zone = ScaleSpec(rule, k=k, hessian_weight=weight), changes.get("dead_zone", 0.0)
        grid = GridSpec(bits, scale, zone, changes.get("form", "steps"))
        others = {name: value for name, value in changes.items() if name not in ("hessian_weight", "dead_zone", "form")}
        return QuantSpec(matrix=grid, table=grid, rounding=solver, embedding_hessian=True, **others)

    return way


def solvers(bench: Bench) -> None:
    """The recipe's own plan with each solver."""
    for bits in (4, 5):
        for i, solver in enumerate((nearest.Spec(), ascending_plain.Spec(), gptq.Spec())):
            spec = replace(bench.recipe.quant, matrix=GridSpec(bits), rounding=solver)
            bench.row(f"int{bits} percentile, {slots.kind_of(solver)}", spec, first=i == 0)


def study(bench: Bench) -> None:
    """The reference study's way, and what mends it."""
    size = bench.row("study", STUDY, first=True)
    bench.row("study, small matrices in float16", replace(STUDY, passthrough_elements=65_536))
    bench.row("study with reference GPTQ", replace(STUDY, rounding=gptq.Spec()))
    bench.row("study without pruning", replace(STUDY, prune=PruneSpec("never")))
    for rule in ("sdclip", "absolute"):
        k, spec = bench.fitted(wide(rule), size)
        bench.row(f"{rule}, all tensors, k = {k:.1f} int{WIDE}", spec)


def scales(bench: Bench) -> None:
    """Each rule at the bytes of the percentile search."""
    for bits in (3, 4, 5):
        grid = GridSpec(bits)
        size = bench.row(
            f"percentile int{bits}", QuantSpec(matrix=grid, table=grid, embedding_hessian=True), first=True
        )
        for rule in ("sdclip", "absolute"):
            k, spec = bench.fitted(wide(rule), size)
            bench.row(f"  {rule}, step {k / largest(WIDE):.2f} σ", spec)
        k, spec = bench.fitted(wide("sdclip", hessian_weight=0.175), size)
        bench.row(f"  sdclip, λ = 0.175, step {k / largest(WIDE):.2f} σ", spec)


def dead_zones(bench: Bench) -> None:
    ways = {"absolute": wide()}
    for width in (0.05, 0.1, 0.15, 0.2):
        ways[f"absolute, dead zone {width}"] = wide(dead_zone=width)
    bench.rows(ways, bench.budget)


def pruning(bench: Bench) -> None:
    """The history's percentages, and selective pruning, each with the step that its zeros pay for."""
    ways = {"not pruned": wide()}
    for percent in (3, 5, 7, 10):
        for when in ("before", "after"):
            ways[f"{percent} % pruned {when} rounding"] = wide(prune=PruneSpec(when, percent / 100))
    for share in (0.05, 0.1, 0.2):
        for by in ("scale", "hessian", "damage"):
            ways[f"{share:.0%} of ±1 by {by}"] = wide(prune=PruneSpec("selective", share, by))
    bench.rows(ways, bench.budget)


def repairs(bench: Bench) -> None:
    ways = {"no repair": wide()}
    for rank, count in ((4, 1), (4, 3), (1, 3), (2, 26), (8, 26)):
        ways[f"rank {rank} of {count}, as published"] = wide(repair=RepairSpec("lqer", rank, count, 64, "plain", False))
        ways[f"rank {rank} of {count}, by Hessian, refitted"] = wide(repair=RepairSpec("lqer", rank, count))
    bench.rows(ways, bench.budget)


def embedding(bench: Bench) -> None:
    """The tied embedding on its own grid, solved or to nearest; the rest at what makes the bytes equal."""
    ways = {"one step for all, solved": wide(), "one step for all, to nearest": _embedding(None, 0.0, False)}
    for bits, k in ((6, 15.0), (6, 20.0), (7, 15.0), (7, 20.0), (8, 20.0)):
        for solved in (True, False):
            ways[f"embedding int{bits} k = {k:g}, {'solved' if solved else 'to nearest'}"] = _embedding(bits, k, solved)
    bench.rows(ways, bench.budget)


def _embedding(bits: int | None, own: float, solved: bool) -> Way:
    part = () if bits is None else (Override(("embedding",), bits=bits, scale=ScaleSpec("sdclip", k=own)),)
    return lambda k: replace(wide()(k), override=part, embedding_hessian=solved)


def forms(bench: Bench) -> None:
    """Steps against Lloyd–Max levels, of rows as they are and rotated, all tensors at the same bits; then one step for
    all of them, widened until the file weighs what that of rotated levels did."""
    for bits in (4, 3, 5):
        for form in FORMS:
            grid = GridSpec(bits, form=form)
            spec = QuantSpec(matrix=grid, table=grid, embedding_hessian=True)
            size = bench.row(f"{bits} bits, {form}", spec, first=form == "steps")
        for form in ("steps", "rotated"):
            k, fitted = bench.fitted(wide(form=form), size)
            bench.row(f"  {form} of {k / largest(WIDE):.2f} σ, one for all, at its bytes", fitted)


def speed(bench: Bench) -> None:
    """GPTQ at B6's size: 66 random matrices, 31.7M weights, solved one after another with all threads on each, side by
    side with a thread each, and so with factors at hand. Reads nothing of the run."""
    chance = torch.Generator().manual_seed(0)
    hessians = {}
    for cols in (512, 1792):
        inputs = torch.randn(2 * cols, cols, generator=chance) @ torch.randn(cols, cols, generator=chance)
        hessians[cols] = inputs.T @ inputs / len(inputs)
    shapes = 11 * ([(512, 512)] * 4 + [(1792, 512), (512, 1792)])
    weights = [torch.randn(shape, generator=chance) for shape in shapes]
    spec = gptq.Spec()
    factors = {cols: gptq.factorise(hessian, spec) for cols, hessian in hessians.items()}

    def solve(weight: torch.Tensor, known: Any) -> torch.Tensor:
        scales = row_scales(weight, 6, ScaleSpec("sdclip"))
        return gptq.solve(weight, scales, 6, known[weight.shape[1]], spec).codes

    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        f"one after another, {torch.get_num_threads()} threads on each": lambda: [solve(w, hessians) for w in weights],
        "side by side, a thread each": lambda: list(side_by_side(lambda w: solve(w, hessians), weights)),
        "side by side, factors known": lambda: list(side_by_side(lambda w: solve(w, factors), weights)),
    }
    first: list[torch.Tensor] = []
    for name, way in ways.items():
        with Stopwatch() as watch:
            codes = way()
        first = first or codes
        moved = sum(int((x != y).sum()) for x, y in zip(first, codes, strict=True))
        print(f"{name:<50}{watch.seconds:>9.1f} s   {moved} codes other than the first's", flush=True)


SECTIONS = {
    "solvers": solvers,
    "study": study,
    "scales": scales,
    "dead_zones": dead_zones,
    "pruning": pruning,
    "repairs": repairs,
    "embedding": embedding,
    "forms": forms,
    "speed": speed,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--bytes", type=int, default=500_000, help="of a file, in the sections at equal bytes")
    arguments.add_argument("--targets", type=int, default=30_000, help="tokens of each text")
    arguments.add_argument("--coder", default="brotli")
    arguments.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    chosen = arguments.parse_args()
    bench = Bench(chosen.run, chosen.targets, chosen.bytes, chosen.coder)
    for name in chosen.only.split(","):
        print(f"\n{name:<50}{'bytes':>10}{'objective':>11}{'held out':>9}{'Δ':>19}{'training':>10}")
        float_bpb = [
            float(prices.sum()) / math.log(2) / text.text_bytes
            for prices, text in zip((bench.float.held_out, bench.float.training), bench.texts, strict=True)
        ]
        print(f"{'float':<50}{'':>10}{'':>11}{float_bpb[0]:>9.4f}{'':>19}{float_bpb[1]:>10.4f}")
        SECTIONS[name](bench)


if __name__ == "__main__":
    main()
