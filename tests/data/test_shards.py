"""The challenge's token files: read exactly, refused when they are not what their header says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError, RecipeError
from fairway.base.specs import build
from fairway.data import DataSpec, build_tokenizer, open_corpus, tokenize
from fairway.data.sources.shards import open_shard, write_shard
from fairway.data.splits import Shard, divide_dev_shards


@pytest.fixture
def folder(tmp_path, tokenizer, source_text):
    """Three training shards and a held-out one, documents of 2,000 bytes."""
    pieces = [source_text[i : i + 2000] for i in range(0, 40_000, 2000)]
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    for name, part in (("train_000000", 0), ("train_000001", 5), ("train_000002", 10), ("val_000000", 15)):
        tokens = np.concatenate([np.append(tokenizer.bos, tokenizer.encode(d)) for d in pieces[part : part + 5]])
        write_shard(tmp_path / f"fineweb_{name}.bin", tokens.astype(np.uint16))
    return tmp_path


def spec_of(folder, **values):
    tokenizer = {"vocab": 400, "model": str(folder / "t.model")}
    return build(DataSpec, {"source": "shards", "path": str(folder), "tokenizer": tokenizer, **values})


def test_the_format_byte_by_byte(tmp_path):
    write_shard(tmp_path / "x.bin", np.array([1, 258, 65535], dtype=np.uint16))
    header = (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert (tmp_path / "x.bin").read_bytes() == header.ljust(1024, b"\0") + b"\x01\x00\x02\x01\xff\xff"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_any_tokens_come_back(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, np.array(tokens, dtype=np.uint16))
    shard = open_shard(path)
    assert shard.tokens.tolist() == tokens
    assert isinstance(shard.tokens, np.memmap)


def test_training_shards_are_one_stream_and_bytes_are_decoded_ones(folder, source_text):
    spec = spec_of(folder)
    train, valid = open_corpus(spec, "train"), open_corpus(spec, "valid")
    tokenizer = build_tokenizer(spec, train)
    tokens, held_out = tokenize(train, tokenizer), tokenize(valid, tokenizer)
    assert len(tokens.parts) == 3
    assert tokenizer.decode(tokens.tokens) == source_text[:30_000]
    assert held_out.decoded
    assert (held_out.text, held_out.text_bytes, held_out.split) == (source_text[30_000:40_000], 10_000, "valid")


def test_fewer_training_shards_can_be_asked_for(folder):
    spec = spec_of(folder, source={"kind": "shards", "train_shards": 2})
    assert len(open_corpus(spec, "train").shards) == 2


def test_dev_begins_with_a_document(folder, tokenizer):
    spec = spec_of(folder, held_out="dev")
    train, dev = open_corpus(spec, "train"), open_corpus(spec, "dev")
    whole = np.concatenate([shard.tokens for shard in open_corpus(spec_of(folder), "train").shards])
    assert np.array_equal(np.concatenate([s.tokens for s in (*train.shards, *dev.shards)]), whole)
    assert dev.shards[0].tokens[0] == tokenizer.bos
    assert 0 < dev.bytes <= whole.nbytes / 15 + 200  # of the fifteen documents, the last


@pytest.mark.parametrize("sizes", [[1], [100], [50, 50], [1, 99, 1], [20] * 20])
def test_dev_loses_no_token_of_the_shards(tmp_path, sizes):
    shards = [Shard(tmp_path, np.arange(size, dtype=np.uint16)) for size in sizes]
    rest, dev = divide_dev_shards(shards, bos=9999)
    assert sum(len(s.tokens) for s in rest) == sum(sizes) - int(0.05 * sum(sizes))
    assert sum(len(s.tokens) for s in (*rest, *dev)) == sum(sizes)


def test_a_token_beyond_the_vocabulary_is_named(folder):
    path = folder / "fineweb_train_000001.bin"
    tokens = np.array(open_shard(path).tokens)
    tokens[77] = 400
    write_shard(path, tokens)
    spec = spec_of(folder)
    train = open_corpus(spec, "train")
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: token 400 at position 77 .*400 pieces"):
        tokenize(train, build_tokenizer(spec, train))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [(0, 7, "begins with 7, not with 20240520"), (4, 2, "version 2"), (8, 3, "not 1,030 bytes"), (8, -1, "cut short")],
)
def test_a_wrong_header_is_refused(folder, place, value, words):
    path = folder / "fineweb_val_000000.bin"
    content = bytearray(path.read_bytes())
    content[place : place + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"fineweb_val_000000\.bin: .*{words}"):
        open_corpus(spec_of(folder), "train")


@pytest.mark.parametrize("change", [-1, -2, 1, 2, -10_000_000])
def test_a_wrong_size_is_refused(folder, change):
    path = folder / "fineweb_train_000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin: [\d,]+ bytes") as caught:
        open_corpus(spec_of(folder), "train")
    assert "\n" not in str(caught.value)


def test_missing_shards_and_models_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"no file named fineweb_train_\*\.bin"):
        open_corpus(spec_of(tmp_path / "absent"), "train")
    with pytest.raises(RecipeError, match=r"data\.path: not set"):
        open_corpus(build(DataSpec, {"source": "shards"}), "train")
    spec = build(DataSpec, {"source": "shards", "path": str(folder)})
    with pytest.raises(RecipeError, match=r"data\.tokenizer\.model: not set"):
        build_tokenizer(spec, open_corpus(spec, "train"))


def test_one_file_cannot_be_on_both_sides(folder):
    spec = spec_of(folder, source={"kind": "shards", "train": "*.bin", "valid": "*val*.bin"})
    with pytest.raises(RecipeError, match="both training and held-out"):
        open_corpus(spec, "train")
