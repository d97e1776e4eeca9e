"""The account of bytes: what is scored is what the tokens stand for."""

import hashlib

import numpy as np
import pytest

from fairway.base.errors import DataError
from fairway.data import Corpus, Tokenizer, Tokens, check_bytes, count_bytes, tokenize
from fairway.data import tokens as module


def test_tokens_are_bos_and_document_after_document(tokenizer):
    tokens = tokenize(Corpus("valid", (b"one two", b" three")), tokenizer)
    bos = [tokenizer.bos]
    assert (
        tokens.tokens.tolist()
        == bos + tokenizer.encode(b"one two").tolist() + bos + tokenizer.encode(b" three").tolist()
    )
    assert (tokens.text, tokens.text_bytes, tokens.decoded) == (b"one two three", 13, False)
    assert tokens.text_sha256 == hashlib.sha256(b"one two three").hexdigest()


def test_lengths_of_the_targets_add_up_to_the_text(tokenizer, source_text):
    tokens = tokenize(Corpus("valid", (source_text, b"\xff\xfe", "▁".encode())), tokenizer)
    lengths = tokenizer.byte_lengths(tokens.tokens[1:], tokens.tokens[:-1])
    assert int(lengths.sum()) == tokens.text_bytes == len(source_text) + 5
    assert count_bytes(tokens.tokens, tokenizer) == tokens.text_bytes


def test_each_token_covers_its_own_bytes_of_the_text(tokenizer, source_text):
    """Not only the sum: token by token, the table cuts the original text into the tokens' pieces."""
    tokens = tokenize(Corpus("valid", (source_text[:5000],)), tokenizer)
    place = 0
    for token, length in zip(
        tokens.tokens[1:], tokenizer.byte_lengths(tokens.tokens[1:], tokens.tokens[:-1]), strict=True
    ):
        assert tokens.text[place : place + length] == tokenizer.pieces[token]
        place += int(length)


def test_a_wrong_byte_table_stops_the_run_and_names_the_token(tokenizer, source_text):
    wrong = Tokenizer(tokenizer.model)
    victim = int(tokenizer.encode(source_text)[7])
    wrong.base = wrong.base.copy()
    wrong.base[victim] += 1
    tokens = tokenize(Corpus("valid", (source_text,)), tokenizer)
    with pytest.raises(DataError, match=rf"token {victim} at position \d+ is counted as"):
        check_bytes(tokens.tokens, wrong, source_text)


def test_missing_tokens_are_noticed(tokenizer):
    tokens = tokenize(Corpus("valid", (b"one two three",)), tokenizer)
    with pytest.raises(DataError, match="tokens are missing"):
        check_bytes(tokens.tokens[:-1], tokenizer, b"one two three")


def test_parts_read_as_one(tokenizer):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 400, 100).astype(np.uint16)
    tokens = Tokens((whole[:30], whole[30:31], whole[31:]), "train", lambda: b"")
    for start in range(100):
        for stop in range(start, 101):
            assert np.array_equal(tokens.read(start, stop), whole[start:stop]), (start, stop)
    assert len(tokens) == 100
    assert np.array_equal(tokens.tokens, whole)


def test_large_corpora_are_encoded_once(tokenizer, source_text, monkeypatch, own_cache):
    monkeypatch.setattr(module, "_CACHED_FROM", 1000)
    corpus = Corpus("train", (source_text, b"more"))
    first = tokenize(corpus, tokenizer)
    stored = list(own_cache.iterdir())
    assert len(stored) == 1
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *_: pytest.fail("encoded again"))
    assert np.array_equal(tokenize(corpus, tokenizer).tokens, first.tokens)


def test_a_damaged_cache_is_not_believed(tokenizer, source_text, monkeypatch, own_cache):
    monkeypatch.setattr(module, "_CACHED_FROM", 1000)
    corpus = Corpus("train", (source_text,))
    first = tokenize(corpus, tokenizer)
    (stored,) = own_cache.iterdir()
    content = bytearray(stored.read_bytes())
    content[500] ^= 1
    stored.write_bytes(content)
    assert np.array_equal(tokenize(corpus, tokenizer).tokens, first.tokens)


def test_another_cut_into_documents_has_a_cache_of_its_own(tokenizer, monkeypatch, own_cache):
    monkeypatch.setattr(module, "_CACHED_FROM", 4)
    one = tokenize(Corpus("train", (b"abc def",)), tokenizer)
    two = tokenize(Corpus("train", (b"abc", b" def")), tokenizer)
    assert one.tokens.tolist().count(tokenizer.bos) == 1
    assert two.tokens.tolist().count(tokenizer.bos) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CACHED_FROM", 4)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tokenize(Corpus("train", (b"abc def",)), tokenizer).text == b"abc def"
