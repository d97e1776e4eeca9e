"""Overlap: exact duplicates by folded text, near ones by MinHash, both beside brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data import Tokens
from fairway.data.overlap import (
    Bands,
    Document,
    Group,
    batched,
    of_shards,
    of_text,
    of_tokens,
    scan,
    shared_text,
    shared_tokens,
)
from fairway.data.overlap import documents as documents_module
from fairway.data.overlap.documents import WORDS
from fairway.data.overlap.minhash import BINS, EMPTY, estimates, shingles
from fairway.data.overlap.scan import sketch
from fairway.data.splits import Shard

WORDS_AT_HAND = [f"word{i}" for i in range(3000)]


def text_of(generator, count):
    return " ".join(generator.choice(WORDS_AT_HAND, count))


def changed(generator, text, share):
    """At least one word, and each other one with a chance of `share`, is another."""
    words = text.split()
    for place in {int(generator.integers(len(words))), *np.flatnonzero(generator.random(len(words)) < share).tolist()}:
        words[place] = f"changed{generator.integers(1 << 40)}"
    return " ".join(words)


def documents(texts, name="t"):
    return [Document(f"{name}:{i}", text.encode()) for i, text in enumerate(texts)]


def group(texts):
    return Group(tuple(documents(texts)), 0)


def scanned(train, held_out, limit=0.8, **values):
    return scan(batched(documents(train)), batched(documents(held_out, "h")), of_text, limit, **values)


def jaccard(left, right, width=WORDS):
    """By its definition, on tuples of words."""
    sets = []
    for text in (left, right):
        words = text.casefold().split()
        sets.append({tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))} if words else set())
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def sketched(texts):
    return sketch(of_text(group(texts)))


@pytest.mark.parametrize("count", [3, 30, 100, 1000, 4000])
def test_the_estimate_is_unbiased_and_as_exact_as_promised(count):
    """Over many pairs the mean error is near 0 and the spread near √(J (1 − J) / 128), empty bins or not."""
    generator = np.random.default_rng(count)
    errors = []
    for _ in range(120):
        text = text_of(generator, count)
        other = changed(generator, text, generator.choice([0.01, 0.03, 0.1]))
        made = sketched([text, other])
        exact = jaccard(text, other)
        errors.append(estimates(made.signatures[:1], made.signatures[1:])[0] - exact)
    # few shingles: bins borrow from the same few, so that the spread is larger; up to 0.25 for one or two dozen
    spread = 0.05 if count >= 1000 else 0.09 if count >= 100 else 0.3
    assert abs(np.mean(errors)) < 3 * spread / np.sqrt(len(errors))
    assert np.std(errors) < spread


def test_shingles_are_runs_of_units_within_a_document():
    units = np.arange(1, 12, dtype=np.uint64)
    hashes, home = shingles(units, np.array([4, 0, 2, 5]), 3)
    assert home.tolist() == [0, 0, 2, 3, 3, 3]
    assert len(set(hashes.tolist())) == 6
    again, _ = shingles(units[6:], np.array([5]), 3)
    assert again.tolist() == hashes[3:].tolist()


def test_words_have_the_same_hash_wherever_they_stand():
    first, second = of_text(group(["alpha beta", "gamma", "", "beta gamma alpha"])), of_text(group(["gamma"]))
    assert first.counts.tolist() == [2, 1, 0, 3]
    alpha, beta, gamma = first.units[:3].tolist()
    assert first.units.tolist() == [alpha, beta, gamma, beta, gamma, alpha]
    assert second.units.tolist() == [gamma]
    assert len({alpha, beta, gamma}) == 3


def test_a_document_without_words_has_an_empty_signature():
    made = sketched(["", " \n", "a"])
    assert (made.signatures[:2] == EMPTY).all()
    assert not (made.signatures[2] == EMPTY).any()
    assert made.full.tolist() == [False, False, True]


def test_bands_find_what_equal_bands_are_found_by_brute_force():
    generator = np.random.default_rng(1)
    kept = generator.integers(0, 5, (40, BINS)).astype(np.uint32)
    asked = generator.integers(0, 5, (30, BINS)).astype(np.uint32)
    rows, numbers = Bands(kept).pairs(asked)
    expected = {
        (a, b)
        for a in range(30)
        for b in range(40)
        if (asked[a].reshape(-1, 4) == kept[b].reshape(-1, 4)).all(axis=1).any()
    }
    assert set(zip(rows.tolist(), numbers.tolist(), strict=True)) == expected
    assert len(rows) == len(expected)


@pytest.fixture(scope="module")
def planted():
    """(training, held-out): of 200 held-out documents 10 stand in training, 10 nearly, the rest is other text."""
    generator = np.random.default_rng(7)
    held_out = [text_of(generator, int(generator.integers(50, 400))) for _ in range(200)]
    train = [text_of(generator, int(generator.integers(50, 400))) for _ in range(600)]
    for i in range(10):
        train[37 * i] = held_out[i].upper().replace(" ", "\n  ")
        train[37 * i + 5] = changed(generator, held_out[20 + i], 0.01)
        train[37 * i + 9] = changed(generator, held_out[40 + i], 0.2)  # alike, but far below the limit
    return train, held_out


def test_what_was_planted_is_found_and_nothing_else(planted):
    train, held_out = planted
    found = scanned(train, held_out)
    near = {20 + i for i in range(10) if jaccard(held_out[20 + i], train[37 * i + 5]) >= 0.8}
    assert len(near) >= 5
    assert (found.held_out, found.train, found.empty) == (200, 600, 0)
    assert (found.exact, found.train_exact) == (10, 10)
    assert abs(found.near - len(near)) <= 2  # those at the very limit, by chance
    assert found.exact_share == 0.05
    assert found.exact_bytes == sum(len(held_out[i]) for i in range(10))
    first = found.examples[0]
    assert (first.held_out, first.train, first.alike) == ("h:0", "t:0", 1.0)
    assert first.text == held_out[0].encode()[:200]
    for example in found.examples[5:]:
        number, place = int(example.held_out[2:]), int(example.train[2:])
        assert abs(example.alike - jaccard(held_out[number], train[place])) < 0.12


def test_batches_and_processes_change_nothing(planted, monkeypatch):
    train, held_out = planted
    alone = scanned(train, held_out, 0.7)
    monkeypatch.setattr(documents_module, "BATCH", 5000)
    assert scanned(train, held_out, 0.7) == alone
    assert scanned(train, held_out, 0.7, processes=2) == alone


def test_copies_among_the_held_out_documents_count_each():
    found = scanned(["same text"], ["Same  text", "same text", "other", "", " "])
    assert (found.exact, found.held_out, found.empty, found.exact_share) == (2, 3, 2, 2 / 3)


def test_no_more_than_a_few_batches_of_training_text_are_held(monkeypatch):
    """Training documents are taken one after another, as they are compared."""
    monkeypatch.setattr(documents_module, "BATCH", 1000)
    taken = []

    def stream():
        for i in range(200):
            taken.append(i)
            yield Document(str(i), b"x" * 500)

    groups = batched(stream())
    next(groups)
    assert len(taken) < 4


TOKENS = st.lists(st.integers(0, 4), max_size=60)


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS, st.lists(st.integers(1, 59), max_size=4))
def test_documents_of_tokens_are_found_as_by_brute_force(train, held_out, cuts):
    """BOS is 1; parts are cut anywhere; documents without a token are none."""
    parts = tuple(part for part in np.split(np.array(train, np.uint16), sorted(cuts)) if len(part))
    parts = parts or (np.zeros(0, np.uint16),)
    one = Tokens(parts, "train", lambda: b"")
    other = Tokens.of(np.array(held_out, np.uint16), "valid", b"")

    def documents_in(tokens):
        return [part for part in "".join(map(chr, tokens)).split("\x01") if part]

    known, wanted = set(documents_in(train)), documents_in(held_out)
    found = shared_tokens(one, other, 1)
    same = [i for i, document in enumerate(wanted) if document in known]
    assert (found.documents, found.shared, found.first) == (len(wanted), len(same), same[0] if same else -1)


def test_long_documents_that_begin_alike_are_told_apart():
    generator = np.random.default_rng(3)
    body = generator.integers(2, 900, 5000).astype(np.uint16)
    other = body.copy()
    other[-1] ^= 1
    one = np.uint16([1])
    train = Tokens((np.concatenate((one, other)), np.concatenate((one, body[:4000]))), "train", lambda: b"")
    assert shared_tokens(train, Tokens.of(np.concatenate((one, body)), "valid", b""), 1).shared == 0
    train = Tokens((np.concatenate((one, body[:4000])), body[4000:]), "train", lambda: b"")
    assert shared_tokens(train, Tokens.of(np.concatenate((one, body)), "valid", b""), 1).shared == 1


def test_shared_text_is_folded_text():
    found = shared_text([b"The  Cat", b"dog"], [b"bird", b"the cat\n", b"DOG"])
    assert (found.documents, found.shared, found.first, found.share) == (3, 2, 1, 2 / 3)
    assert shared_text([b"a"], []).share == 0.0


def test_shards_are_one_stream_of_documents(tmp_path):
    parts = ([5, 1, 6, 7, 1], [8, 9], [10, 1, 1, 11])
    shards = [Shard(tmp_path / f"{i}.bin", np.array(part, np.uint16)) for i, part in enumerate(parts)]
    made = [
        (one.place.rpartition("/")[2], np.frombuffer(one.content, np.uint16).tolist()) for one in of_shards(shards, 1)
    ]
    assert made == [
        ("0.bin: document 0", [5]),
        ("0.bin: document 1", [6, 7]),
        ("0.bin: document 2", [8, 9, 10]),
        ("2.bin: document 1", []),
        ("2.bin: document 2", [11]),
    ]


def test_shards_are_scanned_by_their_tokens(tmp_path):
    generator = np.random.default_rng(5)
    body = [generator.integers(2, 1000, 300).astype(np.uint16) for _ in range(20)]
    near = body[3].copy()
    near[100] = 1001

    def shard(name, parts):
        return Shard(tmp_path / name, np.concatenate([np.concatenate(([1], part)) for part in parts]).astype(np.uint16))

    train = [shard("a", body[10:15]), shard("b", [*body[15:], body[0], near])]
    found = scan(batched(of_shards(train, 1)), batched(of_shards([shard("v", body[:10])], 1)), of_tokens)
    assert (found.exact, found.near, found.held_out, found.train) == (1, 1, 10, 12)
    assert found.examples[0].train.endswith("b: document 6")
    assert found.examples[1].train.endswith("b: document 7")
