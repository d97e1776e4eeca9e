"""What every loader and every source promises, run on each file of their slots."""

import numpy as np
import pytest
import torch

from fairway.base import slots
from fairway.base.errors import FairwayError
from fairway.base.ranks import Ranks
from fairway.base.specs import build
from fairway.data import Corpus, DataSpec, Tokenizer, Tokens, batches, build_tokenizer, open_corpus
from fairway.data.sources.shards import write_shard

LOADERS, SOURCES, TRANSFORMS = "fairway.data.loaders", "fairway.data.sources", "fairway.data.transforms"


def counted(tokens, parts=1):
    """A text whose tokens all differ, in so many parts; the first begins a document (1), and no other."""
    numbers = np.arange(1, tokens + 1, dtype=np.uint16)
    return Tokens(tuple(np.array_split(numbers, parts)), "train", lambda: b"")


@pytest.mark.parametrize("kind", slots.kinds(LOADERS))
@pytest.mark.parametrize(("tokens", "context"), [(17, 16), (18, 16), (33, 16), (1000, 16), (4097, 64), (5, 1), (2, 1)])
def test_a_loader_reads_inside_the_text_no_window_twice_and_nearly_all_of_it(kind, tokens, context):
    module, text = slots.technique(LOADERS, kind), counted(tokens)
    order = module.order(module.Spec(), text, context, 42)
    for epoch in range(3):
        rows = order.rows(text, epoch * order.windows, order.windows)
        assert rows.shape == (order.windows, context + 1)
        assert rows.dtype == np.uint16
        read = rows[:, :-1].ravel()
        assert len(np.unique(read)) == len(read)
        assert tokens - len(read) < 2 * context + 1
        assert np.isin(rows, text.tokens).all()


@pytest.mark.parametrize("kind", slots.kinds(LOADERS))
def test_a_loader_is_a_pure_function_of_the_window_number(kind):
    module, text = slots.technique(LOADERS, kind), counted(1000, 7)
    order, again = (module.order(module.Spec(), text, 16, 7) for _ in range(2))
    whole = order.rows(text, 0, 200)
    single = [again.rows(text, number, 1)[0].tolist() for number in reversed(range(200))]
    assert whole.tolist() == single[::-1]


@pytest.mark.parametrize("kind", slots.kinds(LOADERS))
def test_the_windows_of_a_step_are_the_same_whatever_the_ranks(kind):
    """Global batches are a function of (seed, step); ranks cut them in order."""
    numbers = np.arange(1000, dtype=np.uint16)
    numbers[[0, 20, 400, 401, 977]] = 1  # documents of 1 to 576 tokens
    tokens = Tokens(tuple(np.split(numbers, [100, 850])), "train", lambda: b"")

    def batch(step, ranks):
        return batches(tokens, slots.technique(LOADERS, kind).Spec(), 7 * 16, 16, 5, ranks).batch(step, ranks)

    for step in (0, 3, 8, 40):
        inputs, targets = batch(step, Ranks())
        assert inputs.shape == (7, 16)
        inside = (inputs != 1) & (targets != 1)
        assert (targets == inputs + 1)[inside].all(), "a target is the token after its input"
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for world in (2, 3, 7):
            parts = [batch(step, Ranks(rank, world)) for rank in range(world)]
            assert torch.equal(torch.cat([x for x, _ in parts]), inputs)
            assert torch.equal(torch.cat([y for _, y in parts]), targets)


@pytest.fixture
def path_of(tmp_path):
    """A place to read for each source; a new source that needs one gets its line here."""
    (tmp_path / "text").write_bytes(b"some words " * 200)
    for part in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{part}_000000.bin", np.arange(2, 202, dtype=np.uint16) + len(part))
    return {"text": str(tmp_path / "text"), "shards": str(tmp_path)}


@pytest.mark.parametrize("kind", slots.kinds(SOURCES))
def test_a_source_gives_the_same_text_each_time_and_sides_that_share_nothing(kind, path_of):
    spec = build(DataSpec, {"source": kind, "path": path_of.get(kind, "")})
    train, valid = open_corpus(spec, "train"), open_corpus(spec, "valid")
    assert (train.split, valid.split) == ("train", "valid")
    assert train.bytes > 0 < valid.bytes
    assert open_corpus(spec, "train").sha256 == train.sha256 != valid.sha256
    assert not set(train.documents) & set(valid.documents)
    assert train.decoded == valid.decoded == (not train.documents)


@pytest.mark.parametrize("kind", slots.kinds(SOURCES))
def test_a_source_that_is_not_there_is_one_line(kind, tmp_path):
    spec = build(DataSpec, {"source": kind, "path": str(tmp_path / "absent")})
    with pytest.raises(FairwayError, match="absent") as caught:
        open_corpus(spec, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", slots.kinds(TRANSFORMS))
@pytest.mark.parametrize(
    "text", ["", "The quick BROWN fox, iPhone", "\ue001\ue004\ue002X", "ǅ ß İ É\0\n", "a\x1a▁\ufffd"]
)
def test_a_transform_loses_nothing_and_counts_the_original(kind, text):
    """Learned with it, the tokenizer returns any text, its bytes add up, and the artifact's copy does the same."""
    spec = build(DataSpec, {"tokenizer": {"vocab": 300, "transform": kind}})
    sample = b"The quick brown fox jumps over the LAZY dog. Then it sleeps, and so on and on it goes. "
    tokenizer = build_tokenizer(spec, Corpus("train", (sample,)))
    held = {piece.decode("utf-8", "replace") for piece in tokenizer.pieces}
    assert held >= set(slots.technique(TRANSFORMS, kind).SYMBOLS)
    data = text.encode()
    for made in (tokenizer, Tokenizer.from_bytes(tokenizer.model)):
        tokens = made.encode(data)
        assert made.decode(tokens) == data
        assert int(made.byte_lengths(tokens, np.append(made.bos, tokens)[:-1]).sum()) == len(data)
