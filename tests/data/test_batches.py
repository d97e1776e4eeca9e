"""Batches: a pure function of (seed, step), of training text alone, whose ranks share one global batch."""

import numpy as np
import pytest
import torch

from fairway.base import slots
from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.ranks import Ranks
from fairway.data import Tokens, batches
from fairway.data.loaders import sequential, shuffled

LOADERS = [sequential.Spec(), shuffled.Spec()]


def tokens_of(count, split="train"):
    """Token t at position t."""
    return Tokens.of(np.arange(count, dtype=np.uint16), split, b"")


@pytest.mark.parametrize("loader", LOADERS)
def test_targets_are_inputs_one_later(loader):
    inputs, targets = batches(tokens_of(1000), loader, 64, 16, seed=1).batch(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_one_global_batch(loader, world):
    made = batches(tokens_of(1000), loader, 64, 16, seed=1, ranks=Ranks(0, world))
    for step in (0, 7, 40):
        parts = [made.batch(step, Ranks(rank, world))[0] for rank in range(world)]
        assert torch.equal(torch.cat(parts), made.batch(step)[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_depends_on_seed_and_step_alone(loader):
    first, second = (batches(tokens_of(1000), loader, 64, 16, seed=5) for _ in range(2))
    later = second.batch(30)[0]
    for step in range(30):
        first.batch(step)
    assert torch.equal(first.batch(30)[0], later)


def test_shuffled_batches_differ_between_seeds_and_epochs():
    one, two = (batches(tokens_of(1000), shuffled.Spec(), 64, 16, seed) for seed in (1, 2))
    assert not torch.equal(one.batch(0)[0], two.batch(0)[0])
    epoch = one.order.windows
    starts = [one.order.starts(n * epoch, epoch) for n in range(4)]
    assert len({tuple(found) for found in starts}) == 4
    assert len({int(found.min()) for found in starts}) > 1  # the phase


def test_sequential_batches_read_the_text_from_start_to_end_and_again():
    made = batches(tokens_of(101), sequential.Spec(), 20, 10, seed=1)
    read = torch.cat([made.batch(step)[0] for step in range(6)]).flatten().tolist()
    assert read[:100] == list(range(100))
    assert read[100:] == list(range(20))


def test_shuffled_order_is_pinned():
    """Recorded: a numpy release, or a change here, must not move a run's data."""
    order = shuffled.order(shuffled.Spec(), 200, 16, seed=1337)
    assert order.starts(0, 14).tolist() == [74, 90, 10, 122, 106, 58, 170, 42, 138, 154, 26, 145, 81, 1]


def test_windows_cross_shards():
    parts = tuple(np.array_split(np.arange(1000, dtype=np.uint16), 13))
    one = batches(tokens_of(1000), shuffled.Spec(), 160, 16, seed=1)
    many = batches(Tokens(parts, "train", lambda: b""), shuffled.Spec(), 160, 16, seed=1)
    for step in range(12):
        assert torch.equal(one.batch(step)[0], many.batch(step)[0])


@pytest.mark.parametrize("split", ["valid", "dev"])
@pytest.mark.parametrize("loader", LOADERS)
def test_held_out_text_cannot_be_trained_on(loader, split):
    with pytest.raises(HonestyError, match=split):
        batches(tokens_of(1000, split), loader, 64, 16, seed=1)


@pytest.mark.parametrize("loader", LOADERS)
def test_text_too_short_for_one_window_is_refused(loader):
    with pytest.raises(DataError, match=r"16 tokens are too few for one window of 16"):
        batches(tokens_of(16), loader, 16, 16, seed=1)
    assert batches(tokens_of(17), loader, 16, 16, seed=1).batch(9)[0].tolist() == [list(range(16))]


@pytest.mark.parametrize(("batch_tokens", "context", "world"), [(8, 16, 1), (24, 16, 1), (16, 0, 1), (32, 16, 3)])
def test_impossible_batches_are_refused(batch_tokens, context, world):
    with pytest.raises(RecipeError, match="batch of"):
        batches(tokens_of(1000), LOADERS[0], batch_tokens, context, seed=1, ranks=Ranks(0, world))


def test_every_loader_is_tested_here():
    assert {slots.kind_of(loader) for loader in LOADERS} == set(slots.kinds("fairway.data.loaders"))
