"""A fit as part of a run, and beside one: where its files lie."""

import copy
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fairway.artifact import Sealed, open_artifact, seal
from fairway.artifact.integers import write_integers
from fairway.artifact.squeeze import squeeze
from fairway.base.errors import BudgetError
from fairway.base.journal import Run
from fairway.data import open_corpus, tokenize
from fairway.model import GPT
from fairway.quant import Hessians, Tensors, dequantized
from fairway.recipe import Recipe
from fairway.score import Ledger
from fairway.score.evaluate import score_model, stream_of
from fairway.steps.first import by_the_first
from fairway.steps.fitting import Fit, Point, Subject, fit_to
from fairway.steps.products import ARTIFACT, INTEGERS, WEIGHTS, decoder_share, product


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) fits its file to a budget."""
    return bool(recipe["quant"]["fit"]["budget"])


def fit_run(recipe: Recipe, run: Run, model: GPT, hessians: Hessians, code: int) -> None:
    """The integers and the artifact of a run with `quant.fit`, by the first rank for all, beside so many bytes of
    code. Books `fit` and `quant`."""

    def work() -> None:
        fit = fit_in(run.path("."), recipe, run, Subject.of(model, recipe.quant, hessians, run), code)
        write_integers(run.path(INTEGERS), fit.tensors)
        run.fact("fit", **fit.plain(), artifact_sha256=fit.sealed.sha256)
        size = sum(one.entropy_bytes for one in fit.found.solved.values())
        run.fact("quant", seconds=round(fit.seconds, 3), entropy_bytes=round(size), damage=fit.found.damage)

    by_the_first(run, work)


def fit_in(
    folder: Path, recipe: Recipe, run: Run, subject: Subject, code: int = 0, budget: int = 0, points: int = 12
) -> Fit:
    """A fit whose file is `folder`/artifact.fw: whole there when it is found, otherwise nothing is left. budget: of the
    file and the code together; 0: the recipe's."""
    budget = budget or recipe.quant.fit.budget
    if code >= budget:
        raise BudgetError(f"fit: a budget of {budget:,} bytes, and the exported script alone has {code:,}; raise it")
    tokenizer = open_artifact(product(run, WEIGHTS)).tokenizer
    tries: list[Path] = []

    def write(tensors: Tensors) -> Sealed:
        tries.append(folder / f"{ARTIFACT}.{os.getpid()}.try{len(tries) + 1}")
        return seal(tries[-1], tensors, recipe.model, tokenizer.size, tokenizer, decoder_share(recipe), recipe.pack)

    try:
        fit = fit_to(subject, budget - code, len(squeeze(tokenizer.model)), write, run, points, code)
        fit.sealed.path.replace(folder / ARTIFACT)
        return fit
    finally:
        with suppress(OSError):  # rmdir: of a refused fit's own folder nothing is left; it fails where it holds a file
            for path in tries:
                path.unlink(missing_ok=True)
            folder.rmdir()


def on_training_text(subject: Subject, points: list[Point], recipe: Recipe, run: Run, targets: int) -> list[float]:
    """Bits per byte of the first `targets` tokens of the training text, in plain windows, under each point's plan."""
    tokenizer = open_artifact(product(run, WEIGHTS)).tokenizer
    whole = tokenize(open_corpus(recipe.data, "train"), tokenizer, recipe.data.lossy, run)
    tokens = np.asarray(whole.tokens[: targets + 1])
    size = int(tokenizer.byte_lengths(tokens[1:], tokens[:-1]).sum())
    stream = stream_of("quantized", len(tokens) - 1, recipe.score, recipe.model.context)
    model, quiet = copy.deepcopy(subject.model).eval(), Run(quiet=True)
    found = []
    with run.meter("training text", len(points), "points") as meter:
        for point in points:
            _, tensors, _ = subject.solve(point.choices, math.inf, quiet)
            model.load_state_dict(dequantized(tensors), assign=False)
            ledger = Ledger(len(tokens) - 1)
            nats = score_model(model, tokens, stream, recipe.score, "quantized", tokenizer.size, ledger)
            found.append(nats / math.log(2) / size)
            meter.update(len(found))
    return found
