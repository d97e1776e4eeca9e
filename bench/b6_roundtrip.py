"""The reference shape (33.3M parameters) through quantisation, sealing and opening: seconds, peak memory, bytes.

    python bench/b6_roundtrip.py [--coder brotli] [--sequences 4] [--context 512] [--out FILE]

Weights are the initial ones moved by noise of the size that training leaves (σ of a row varies, a few outliers), not
trained: the bytes say what random weights cost on this plan, the seconds and the memory what any weights cost.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch

from fairway.artifact import PackSpec, open_artifact, seal
from fairway.base import specs
from fairway.base.clock import Stopwatch
from fairway.base.journal import Run
from fairway.data.learning import train
from fairway.data.tokenizer import Tokenizer, TokenizerSpec
from fairway.model import GPT, ModelSpec, build_model, parameter_count, tags
from fairway.quant import Quantized, QuantSpec, gather, quantize

B6 = {
    "attention": "exclusive",
    "embed": ({"kind": "bigram_hash", "rows": 6144, "width": 128}, "smear"),
    "value_embedding": {"width": 128, "layers": (9, 10)},
}


@torch.no_grad()
def vary(model: GPT, seed: int = 0) -> None:
    """Moves the weights off their initial values: rows of different size, heavy tails."""
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if tags(model)[name].role in ("matrix", "table"):
            rows = 0.03 * torch.exp(0.3 * torch.randn(parameter.shape[0], 1, generator=chance))
            noise = torch.randn(parameter.shape, generator=chance)
            parameter.add_(rows * noise * (1 + 0.1 * noise.square()))


def tokenizer(vocab: int) -> Tokenizer:
    """Any tokenizer of the right size: words of random letters."""
    chance = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgk", dtype=np.uint8)
    words = [chance.choice(letters, chance.integers(2, 9)).tobytes() for _ in range(3000)]
    return Tokenizer(train([b" ".join(chance.choice(words, 400)) for _ in range(60)], TokenizerSpec(vocab=vocab)))


def peak() -> float:
    """MB of memory held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--coder", default="brotli")
    options.add_argument("--rounding", default="gptq")
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--context", type=int, default=512)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    seconds, memory = {}, {}
    spec, run, words = specs.build(ModelSpec, B6), Run(), tokenizer(1024)
    model = build_model(spec, words.size, seed=0)
    vary(model)
    memory["model"] = peak()
    quant = specs.build(QuantSpec, {"rounding": given.rounding, "calibration_sequences": given.sequences})
    chance = torch.Generator().manual_seed(1)
    text = [torch.randint(0, words.size, (1, given.context), generator=chance) for _ in range(given.sequences)]
    with Stopwatch() as watch:
        hessians = gather(model, text)
    seconds["calibration"], memory["calibration"] = watch.seconds, peak()
    with Stopwatch() as watch:
        tensors = quantize(model, hessians, quant, run)
    seconds["quantize"], memory["quantize"] = watch.seconds, peak()
    with tempfile.TemporaryDirectory() as folder:
        path = given.out or Path(folder) / "b6.fw"
        with Stopwatch() as watch:
            packing = specs.build(PackSpec, {"coder": given.coder})
            sealed = seal(path, tensors, spec, words.size, words, {"score": {"stride": 64}}, packing)
        seconds["seal"], memory["seal"] = watch.seconds, peak()
        with Stopwatch() as watch:
            opened = open_artifact(path)
        seconds["open"] = watch.seconds
        with Stopwatch() as watch:
            opened.model()
        seconds["model"], memory["open"] = watch.seconds, peak()
    same = all(_same(value, opened.tensors[name]) for name, value in tensors.items())
    report = {
        "parameters": parameter_count(model),
        "same_integers": same,
        "bytes": sealed.bytes,
        "entropy_bytes": run.facts["quant"]["entropy_bytes"],
        "objective_over_nearest": run.facts["quant"]["objective"] / run.facts["quant"]["objective_nearest"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_megabytes": {name: round(value) for name, value in memory.items()},
        "sections": sealed.sections,
    }
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if same else 1)


def _same(first: object, second: object) -> bool:
    if isinstance(first, Quantized) and isinstance(second, Quantized):
        return np.array_equal(first.codes, second.codes) and np.array_equal(first.scales, second.scales)
    return isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and np.array_equal(first, second)


if __name__ == "__main__":
    main()
