"""Batches: a pure function of (seed, step), of training text alone, whose ranks share one global batch."""

import numpy as np
import pytest
import torch

from fairway.base import slots
from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.ranks import Ranks
from fairway.data import Tokens, batches
from fairway.data.loaders import coprime, documents, sequential, shuffled

LOADERS = [sequential.Spec(), shuffled.Spec(), coprime.Spec(), documents.Spec()]


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
    order = shuffled.order(shuffled.Spec(), tokens_of(200), 16, seed=1337)
    assert order.starts(0, 14).tolist() == [74, 90, 10, 122, 106, 58, 170, 42, 138, 154, 26, 145, 81, 1]


def in_parts(*lengths):
    """Token t at position t, in parts of these lengths."""
    numbers = np.arange(sum(lengths), dtype=np.uint16)
    return Tokens(tuple(np.split(numbers, np.cumsum(lengths)[:-1])), "train", lambda: b"")


def test_coprime_order_is_pinned():
    order = coprime.order(coprime.Spec(), in_parts(120, 90), 16, seed=1337)
    assert order.starts(0, 12).tolist() == [144, 16, 0, 160, 80, 176, 64, 48, 128, 32, 10, 167]


def test_coprime_windows_stay_in_their_shard_and_every_stretch_holds_a_share_of_each():
    """Three shards, one a third of the others, one too short for a window."""
    text = in_parts(9_700, 3_300, 10, 9_700)
    order = coprime.order(coprime.Spec(), text, 16, seed=1)
    shard_of = np.searchsorted(np.cumsum([9_700, 3_300, 10, 9_700]), np.arange(len(text)), side="right")
    for epoch in range(2):
        rows = order.rows(text, epoch * order.windows, order.windows)
        homes = shard_of[rows]
        assert (homes == homes[:, :1]).all()
        for first in range(0, order.windows - 70, 70):
            counts = np.bincount(homes[first : first + 70, 0], minlength=4)
            assert np.abs(counts - [30, 10, 0, 30]).max() <= 1
        steps = np.diff(order.starts(epoch * order.windows, order.windows)[homes[:, 0] == 0])
        assert len(set((steps % (16 * 605)).tolist())) == 1, "one stride for the whole shard"
        assert np.abs(steps).min() > 16 * 100, "neighbours in turn lie far apart"


@pytest.mark.parametrize("blocks", range(1, 200))
def test_a_stride_reaches_every_block(blocks):
    for word in range(0, 2**64, 2**61 + 12345):
        stride = coprime.coprime(word, blocks)
        assert len({number * stride % blocks for number in range(blocks)}) == blocks


def test_coprime_strides_need_a_shard_that_holds_a_window():
    with pytest.raises(DataError, match="no shard of it holds a window of 16 tokens"):
        batches(in_parts(16, 16, 9), coprime.Spec(), 16, 16, seed=1)


def lettered(*lengths):
    """Documents of these lengths: BOS (1), then tokens that no other document holds."""
    numbers, documents = iter(range(2, 60_000)), []
    for length in lengths:
        documents.append([1, *(next(numbers) for _ in range(length - 1))])
    return documents


def test_every_epoch_lays_all_documents_end_to_end_in_another_order():
    known = lettered(5, 1, 40, 17, 2, 90, 16, 33, 8, 45)  # 257 tokens: 16 windows of 16 and a target
    flat = np.concatenate(known).astype(np.uint16)
    text = Tokens(tuple(np.split(flat, [30, 31, 200])), "train", lambda: b"")
    order, found = documents.order(documents.Spec(), text, 16, seed=3), []
    for epoch in range(3):
        rows = order.rows(text, epoch * 16, 16)
        line = [*rows[:, :-1].ravel().tolist(), int(rows[-1, -1])]
        starts = [place for place, token in enumerate(line) if token == 1]
        read = [line[a:b] for a, b in zip(starts, [*starts[1:], len(line)], strict=True)]
        assert sorted(read) == sorted(known), "each document once, whole"
        found.append(line)
    assert found[0] != found[1] != found[2]
    crossing = order.rows(text, 12, 30).tolist()
    assert crossing == [order.rows(text, number, 1)[0].tolist() for number in range(12, 42)]


def test_documents_order_is_pinned():
    text = Tokens.of(np.concatenate(lettered(3, 4, 6, 4)).astype(np.uint16), "train", b"")
    order = documents.order(documents.Spec(), text, 4, 1337)
    assert documents._epoch(order, 0)[0].tolist() == [0, 3, 1, 2]


def test_a_text_without_documents_is_refused():
    with pytest.raises(DataError, match=r"no token 7 in it.*data\.loader\.bos"):
        batches(Tokens.of(np.zeros(100, dtype=np.uint16), "train", b""), documents.Spec(bos=7), 16, 16, seed=1)


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
