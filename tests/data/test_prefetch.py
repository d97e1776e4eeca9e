"""Batches prepared in the background are the same batches; what fails there fails here; the thread ends."""

import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from fairway.base.errors import DataError, RecipeError
from fairway.base.ranks import Ranks
from fairway.base.specs import build
from fairway.data import DataSpec, Tokens, batches
from fairway.data.loaders import shuffled
from fairway.data.prefetch import Ahead


def made(world=1):
    tokens = Tokens.of(np.arange(5000, dtype=np.uint16), "train", b"")
    return batches(tokens, shuffled.Spec(), 64, 16, seed=1, ranks=Ranks(0, world))


class Recording:
    """Batches that remember who made them, in which order; step 5 fails."""

    def __init__(self, fails=-1, seconds=0.0):
        self.asked, self.fails, self.seconds = [], fails, seconds

    def batch(self, step, ranks=None):
        time.sleep(self.seconds)
        self.asked.append((step, threading.current_thread().name))
        if step == self.fails:
            raise DataError("shard 3: gone")
        return torch.tensor(step), torch.tensor(step)


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_batches_are_those_of_the_foreground(depth, rank):
    """In order, again from 0 (after a warm-up), from the middle (resumed), and backwards."""
    plain, ranks = made(2), Ranks(rank, 2)
    with Ahead(made(2), depth) as ahead:
        for step in [0, 0, 1, 2, 3, 50, 51, 52, 10, 9, 8, 200]:
            for got, wanted in zip(ahead.batch(step, ranks), plain.batch(step, ranks), strict=True):
                assert torch.equal(got, wanted)
                assert got.dtype == torch.int64


def test_the_next_batches_are_made_while_a_step_works():
    source = Recording()
    with Ahead(source, 2) as ahead:
        ahead.batch(0)
        while len(source.asked) < 3:
            time.sleep(0.001)
        assert [step for step, _ in source.asked] == [0, 1, 2]
        assert all(name.startswith("batches") for _, name in source.asked), "in the background"
        ahead.batch(1)
        ahead.batch(2)
    assert [step for step, _ in source.asked] == list(range(len(source.asked))), "none is made twice"


def test_an_error_is_raised_at_the_batch_that_it_belongs_to():
    with Ahead(Recording(fails=5), 3) as ahead:
        for step in range(5):
            assert int(ahead.batch(step)[0]) == step
        with pytest.raises(DataError, match="shard 3: gone"):
            ahead.batch(5)
        assert int(ahead.batch(6)[0]) == 6


def test_the_thread_ends_with_its_training_even_when_that_fails():
    def alive():
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    began = time.monotonic()
    with suppress(KeyboardInterrupt), Ahead(Recording(seconds=0.05), 50) as ahead:
        ahead.batch(0)
        assert alive()
        raise KeyboardInterrupt
    assert not alive()
    assert time.monotonic() - began < 1.5, "what was not begun is not made"


def test_a_recipe_may_do_without_but_not_with_fewer_than_none():
    assert build(DataSpec, {"ahead": 0}).ahead == 0
    with pytest.raises(RecipeError, match="ahead = -1"):
        build(DataSpec, {"ahead": -1})
