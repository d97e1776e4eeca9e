"""Tokenizers taught by training documents alone, and compared by a small model that is a distribution."""

import json
from itertools import product

import numpy as np
import pytest

from fairway.base.errors import DataError
from fairway.data import Tokenizer, TokenizerSpec
from fairway.data.building import BuildSpec, beginning, compare, comparing, reading, teach
from fairway.data.building.teaching import STRETCH, Sample
from fairway.data.learning import train
from fairway.data.sources.text import documents
from fairway.data.splits import share_of

SPEC = {"vocab": 320, "sample_bytes": 50_000}


@pytest.fixture
def source(tmp_path, source_text):
    place = tmp_path / "text.txt"
    place.write_bytes(source_text)
    return place


def test_a_tokenizer_learns_from_training_documents_alone(source, source_text):
    """Against the trainer on the documents that the hash leaves, and on those after the first ones."""
    whole = documents(source_text, "def ")
    for spec, rest in (
        (BuildSpec(separator="def ", valid_fraction=0.3), [d for d in whole if share_of(d) >= 0.3]),
        (BuildSpec(separator="def ", valid_documents=20), whole[20:]),
    ):
        taught = teach([str(source)], TokenizerSpec(vocab=320), spec)
        assert taught.model == train(rest, TokenizerSpec(vocab=320))
        assert (taught.train_documents, taught.train_bytes) == (len(rest), sum(map(len, rest)))
        assert taught.held_out_documents == len(whole) - len(rest)
        assert taught.sample_bytes == taught.train_bytes, "all of it, as it is less than the sample"
        assert taught.sample_documents == len(rest)


def test_a_document_that_is_held_out_teaches_under_no_number(tmp_path):
    lines = [json.dumps({"text": f"secret {n} " * 30}) for n in (1, 2)]
    lines += [json.dumps({"text": f"plain words number {n} and so on"}) for n in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, *lines[:2]]))
    taught = teach([str(tmp_path / "x.jsonl")], TokenizerSpec(vocab=300), BuildSpec(valid_documents=2))
    assert taught.held_out_documents == 4
    assert b"secret" not in taught.model


def test_a_sample_is_spread_evenly_and_bounded_however_long_the_text_is():
    sample, total, most = Sample(20 * STRETCH), 1000, 0
    for number in range(total):
        sample.add(number, bytes([number % 251]) * STRETCH)
        most = max(most, sample.held)
    assert most <= 41 * STRETCH
    assert 20 * STRETCH <= sample.held <= 40 * STRETCH
    numbers = [number for number, _ in sample.kept]
    assert set(np.diff(numbers).tolist()) == {numbers[1] - numbers[0]}
    assert numbers[0] == 0
    assert total - numbers[-1] <= numbers[1]


def test_the_same_text_teaches_the_same_model_whatever_the_blocks(source, monkeypatch):
    spec = BuildSpec(separator="def ")
    first = teach([str(source)], TokenizerSpec(**SPEC), spec)
    monkeypatch.setattr(reading, "BLOCK", 5000)
    assert teach([str(source)], TokenizerSpec(**SPEC), spec).model == first.model


def test_a_text_that_is_held_out_whole_teaches_nothing(source):
    with pytest.raises(DataError, match=r"text\.txt: no training document in it"):
        teach([str(source)], TokenizerSpec(**SPEC), BuildSpec(valid_documents=5))


@pytest.mark.parametrize(("vocab", "lossless"), [(256, False), (299, False), (300, True), (1000, True)])
def test_small_vocabularies_have_no_byte_pieces_and_say_so(source_text, vocab, lossless):
    tokenizer = Tokenizer(train([source_text], TokenizerSpec(vocab=vocab)))
    assert tokenizer.size == vocab
    assert tokenizer.has_bytes == lossless
    assert tokenizer.decode(tokenizer.encode(b"def f(self):\n    return self")) == b"def f(self):\n    return self"
    assert (tokenizer.decode(tokenizer.encode("漢字".encode())) == "漢字".encode()) == lossless


def test_the_small_models_probabilities_are_a_distribution_at_every_place():
    """All continuations of every context of three tokens, seen or not, learned from two short documents."""
    vocab, bos = 5, 1
    learned = [np.array(tokens, dtype=np.uint16) for tokens in ([2, 3, 2, 3, 4, 2], [3, 3, 0], [])]
    for context in product((0, 2, 3, 4), repeat=3):
        bits = [
            comparing.code_length(learned, [np.array([*context, last], dtype=np.uint16)], vocab, bos)
            - comparing.code_length(learned, [np.array(context, dtype=np.uint16)], vocab, bos)
            for last in (0, 2, 3, 4)
        ]
        # BOS, the fifth token, cannot be asked for in the middle; here it has what is left, as Witten-Bell gives it.
        assert 0 < 1 - sum(2**-b for b in bits) < 1 / vocab + 1e-12


def test_the_small_model_pays_what_the_formula_says():
    """By hand: after (2, 3) in training, the order-1 model alone."""
    learned, scored = [np.array([2, 3], dtype=np.uint16)], [np.array([3], dtype=np.uint16)]
    uniform = 1 / 4
    one = (1 + 2 * uniform) / (2 + 2)  # of the two tokens that were counted, one is a 3; two kinds
    two = (0 + 1 * one) / (1 + 1)  # after BOS came a 2, once
    three = (0 + 1 * two) / (1 + 1)
    four = (0 + 1 * three) / (1 + 1)
    assert comparing.code_length(learned, scored, vocab=4, bos=1) == pytest.approx(-np.log2(four), rel=1e-12)


def test_a_comparison_tells_bytes_tokens_words_and_losses(source_text, tokenizer, shared_data):
    texts = documents(source_text, "def ")
    row = compare(tokenizer, texts)
    tokens = [tokenizer.encode(text) for text in texts]
    assert row.tokens == sum(map(len, tokens))
    assert row.bytes_per_token == len(source_text) / row.tokens
    assert row.tokens_per_word == row.tokens / sum(len(text.split()) for text in texts)
    assert (row.lost, row.sha256, row.pieces) == (0, tokenizer.sha256, 400)
    assert 1.0 < row.bits_per_byte < 4.0, "better than bytes without a context, and no miracle"
    assert row.megabytes_per_second > 0
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    lossy = compare(Tokenizer(model.read_bytes(), model.name), texts)
    assert lossy.lost == sum("\n" in text.decode() or "  " in text.decode() for text in texts)


def test_one_document_cannot_be_halved(tokenizer):
    with pytest.raises(DataError, match="the text is one document"):
        compare(tokenizer, [b"one"])


def test_the_beginning_of_a_text_is_whole_documents(source, source_text):
    whole = documents(source_text, "def ")
    taken = beginning(str(source), "def ", 5000)
    assert taken == whole[: len(taken)]
    assert sum(map(len, taken)) >= 5000 > sum(map(len, taken[:-1]))
    assert beginning(str(source), "def ", 10**9) == whole
