"""A fit at the reference's size: 33.3M weights to 16,000,000 bytes, in seconds on this machine.

    python bench/fit_b6.py [--budget 16000000] [--coder rans] [--threads 2]

Weights and inputs are those of bench/b6_roundtrip.py: random, of rows of different size. The damage means nothing for
them; the seconds, the writings and the landing do.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from b6_roundtrip import B6, peak, tokenizer, vary

from fairway.artifact import PackSpec, seal
from fairway.artifact.squeeze import squeeze
from fairway.base import specs
from fairway.base.clock import Stopwatch
from fairway.base.journal import Run
from fairway.model import ModelSpec, build_model, tags
from fairway.quant import QuantSpec, gather
from fairway.steps.fitting import Subject, fit_to


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budget", type=int, default=16_000_000)
    options.add_argument("--coder", default="rans")
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    spec, run, words = specs.build(ModelSpec, B6), Run(), tokenizer(1024)
    model = build_model(spec, words.size, seed=0)
    vary(model)
    chance = torch.Generator().manual_seed(1)
    text = [torch.randint(0, words.size, (1, 512), generator=chance) for _ in range(8)]
    head = [name for name, tag in tags(model).items() if tag.role == "matrix" or tag.part == "embedding"]
    hessians, packing = gather(model, text, head), specs.build(PackSpec, {"coder": given.coder})
    writing = []
    with tempfile.TemporaryDirectory() as folder:

        def write(tensors):
            with Stopwatch() as watch:
                sealed = seal(Path(folder) / "b6.fw", tensors, spec, words.size, words, {}, packing)
            writing.append(round(watch.seconds, 1))
            return sealed

        with Stopwatch() as watch:
            subject = Subject.of(model, QuantSpec(), hessians, run)
        grids = watch.seconds
        found = fit_to(subject, given.budget, len(squeeze(words.model)), write, run)
    facts = {name: value for name, value in found.plain().items() if name != "choices"}
    facts |= {"seconds_of_grids": round(grids, 1), "seconds_of_writing": writing, "peak_megabytes": round(peak())}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
