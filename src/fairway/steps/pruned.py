"""Pruning until the file fits: the least share of small weights whose written file is within a budget.

What the reference study did by hand for every seed (3 %, 5 %, 7 %, 10 %, and two of three files too large), and #1248
by ten bisections, each a solve and a file. Bytes are foretold by the entropy of the codes, as the first file corrects
it, so that a share costs a solve alone; the file that is kept was weighed. `quant.fit` does less damage for its bytes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fairway.artifact import open_artifact, seal
from fairway.artifact.integers import write_integers
from fairway.base.errors import BudgetError
from fairway.base.journal import Run
from fairway.model import GPT
from fairway.quant import Hessians, PruneSpec, Tensors
from fairway.quant import quantize as quantize_model
from fairway.recipe import Recipe
from fairway.steps.first import by_the_first
from fairway.steps.products import ARTIFACT, INTEGERS, WEIGHTS, decoder_share, product, tidy

NEAR = 0.002  # of the budget, below it: near enough
SOLVES = 12  # of a bisection: shares to 1 in 4,096
MOST = 0.99  # of the weights
WRITINGS = 4  # each corrects what entropy foretells


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) prunes until its file fits."""
    return bool(recipe["quant"]["prune"]["budget"])


def prune_run(recipe: Recipe, run: Run, model: GPT, hessians: Hessians) -> None:
    """The integers of a run with `quant.prune.budget`. Books `pruned` and what quantising books. BudgetError where no
    share fits."""

    def work() -> None:
        search = _Search(recipe, run, model, hessians)
        found = search.least()
        write_integers(run.path(INTEGERS), found.tensors)
        tidy(run, ARTIFACT)
        for name, values in found.facts.items():
            run.fact(name, **values)
        run.fact(
            "pruned",
            fraction=found.fraction,
            bytes=found.bytes,
            budget=search.budget,
            solves=search.solves,
            writings=search.writings,
        )

    by_the_first(run, work)


class _Try:
    """One share: what it came to."""

    def __init__(self, fraction: float, tensors: Tensors, facts: dict[str, dict[str, Any]]) -> None:
        self.fraction, self.tensors, self.facts = fraction, tensors, facts
        self.entropy = int(facts["quant"]["entropy_bytes"])
        self.bytes = 0  # once it is written


class _Search:
    """A bisection as it goes on. rest and coder: a file has about rest + coder · entropy bytes."""

    def __init__(self, recipe: Recipe, run: Run, model: GPT, hessians: Hessians) -> None:
        self.recipe, self.run, self.model, self.hessians = recipe, run, model, hessians
        self.budget = recipe.quant.prune.budget
        self.tokenizer = open_artifact(product(run, WEIGHTS)).tokenizer
        self.rest, self.coder = 0.0, 1.0
        self.solves = self.writings = 0

    def least(self) -> _Try:
        """The share that the recipe begins with, where its file fits; else the least that is found to fit."""
        tried = self._written(self._solved(self.recipe.quant.prune.fraction))
        while tried.bytes > self.budget:
            if self.writings == WRITINGS or tried.fraction >= MOST:
                raise BudgetError(
                    f"quant.prune.budget = {self.budget:,}: with {tried.fraction:.0%} pruned the file has "
                    f"{tried.bytes:,} bytes; raise it, take fewer bits, or quant.fit"
                )
            tried = self._written(self._foretold(tried))
        return tried

    def _foretold(self, above: _Try) -> _Try:
        """The least share, more than that of `above`, whose file is foretold to fit."""
        low, best = above.fraction, self._solved(MOST)
        for _ in range(SOLVES):
            size = self._foretell(best)
            if (1 - NEAR) * self.budget <= size <= self.budget or best.fraction - low < 1e-4:
                break
            tried = self._solved((low + best.fraction) / 2)
            if self._foretell(tried) > self.budget:
                low = tried.fraction
            else:
                best = tried
        return best

    def _foretell(self, tried: _Try) -> float:
        return self.rest + self.coder * tried.entropy

    def _solved(self, fraction: float) -> _Try:
        prune = self.recipe.quant.prune
        when = "before" if prune.when == "never" else prune.when
        spec = replace(self.recipe.quant, prune=PruneSpec(when if fraction else "never", fraction, prune.by))
        quiet = Run(quiet=True)
        self.solves += 1
        return _Try(fraction, quantize_model(self.model, self.hessians, spec, quiet), quiet.facts)

    def _written(self, tried: _Try) -> _Try:
        path, recipe = self.run.path("pruned.fw"), self.recipe
        try:
            share = decoder_share(recipe)
            sealed = seal(path, tried.tensors, recipe.model, self.tokenizer.size, self.tokenizer, share, recipe.pack)
            tried.bytes = sealed.bytes
            codes = sum(size for name, size in sealed.sections.items() if name.startswith("codes."))
        finally:
            path.unlink(missing_ok=True)
        self.writings += 1
        self.rest, self.coder = tried.bytes - codes, codes / max(tried.entropy, 1)
        self.run.say(f"pruned        {tried.fraction:.2%}: {tried.bytes:,} bytes of {self.budget:,}")
        return tried
