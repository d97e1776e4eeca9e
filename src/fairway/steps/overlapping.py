"""Held-out documents that stand in the training text: a fact of every run, and its end where there are too many.

An exported script has it not: it is for whoever chooses the data, and a leak shows in every run before the script is
made. What `data` itself refuses (equal documents of text, byte for byte; equal shards) the script refuses too.
"""

import json
from dataclasses import asdict

from fairway.base.clock import Stopwatch
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data import Corpus
from fairway.data.overlap import Shared, shared_text, shared_tokens
from fairway.recipe import Recipe
from fairway.steps.products import Text

OF_SHARDS = 0.01  # data.overlap_limit where the recipe leaves it open; of text it is 0


def refuse_overlap(recipe: Recipe, train: Corpus, held_out: Corpus, text: Text, run: Run) -> None:
    """Books how many held-out documents stand in the training text too, compared by the first rank for all.
    DataError where their share is over the recipe's bound."""
    limit = recipe.data.overlap_limit
    if limit is None:
        limit = OF_SHARDS if train.shards else 0.0
    with Stopwatch() as watch:
        found = run.ranks.share_text(json.dumps(asdict(_shared(train, held_out, text))) if run.ranks.first else "")
    shared = Shared(**json.loads(found))
    facts = {"compared": shared.by, "held_out_documents": shared.documents, "shared": shared.shared}
    run.fact("overlap", **facts, share=shared.share, limit=limit, seconds=round(watch.seconds, 3))
    if shared.share > limit:
        raise DataError(
            f"data: {shared.shared:,} of {shared.documents:,} held-out documents ({shared.share:.2%}) stand in the "
            f"training text too, the first is number {shared.first:,}; data.overlap_limit = {limit:g}: take them out "
            "(fairway data overlap shows them), or state a higher bound"
        )


def _shared(train: Corpus, held_out: Corpus, text: Text) -> Shared:
    if train.shards:
        return shared_tokens(text.train, text.held_out, text.tokenizer.bos)
    return shared_text(train.documents, held_out.documents)
