"""Global batches of training text, a pure function of (seed, step); a rank takes its slice of each."""

from typing import Any, Protocol

import numpy as np
import torch

from fairway.base import slots
from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.ranks import Ranks
from fairway.data.splits import Uint16
from fairway.data.tokens import Tokens


class Order(Protocol):
    """What a loader decides: which tokens windows number first .. first+count-1 of the run hold."""

    def rows(self, tokens: Tokens, first: int, count: int) -> Uint16:
        """(count, context + 1)"""
        ...


class Batches:
    """tokens: training text alone; windows: of `context` tokens in a global batch; order: a loader's."""

    def __init__(self, tokens: Tokens, order: Order, windows: int, context: int) -> None:
        if tokens.split != "train":
            raise HonestyError(
                f"batches: asked to train on the {tokens.split} split; only training text may be learned from"
            )
        self.tokens, self.order, self.windows, self.context = tokens, order, windows, context

    def batch(self, step: int, ranks: Ranks | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), both (n, context) int64: this rank's share of the windows of global batch `step`."""
        share = (ranks or Ranks()).share(self.windows)
        rows = self.order.rows(self.tokens, step * self.windows + share.start, share.stop - share.start)
        inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def batches(
    tokens: Tokens, loader: Any, batch_tokens: int, context: int, seed: int, ranks: Ranks | None = None
) -> Batches:
    """Batches of `batch_tokens` tokens over all ranks, in windows of `context`, in the order of a loader's Spec.

    HonestyError for held-out text, DataError where the text holds no window, RecipeError for impossible sizes.
    """
    if context < 1 or batch_tokens < context or batch_tokens % context:
        raise RecipeError(f"batch of {batch_tokens} tokens: a multiple of the context ({context}) is needed")
    windows, world = batch_tokens // context, (ranks or Ranks()).world
    if windows < world:
        raise RecipeError(
            f"batch of {batch_tokens} tokens: {windows} window(s) for {world} ranks; one each is the least"
        )
    if len(tokens) < context + 1:
        raise DataError(
            f"training text: {len(tokens):,} tokens are too few for one window of {context:,} and its target; "
            "give more text, or a shorter context"
        )
    return Batches(tokens, slots.module_of(loader).order(loader, tokens, context, seed), windows, context)
