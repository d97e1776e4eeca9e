"""The case transform: any text comes back, its bytes are counted in the original, an artifact holds all it takes."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError, RecipeError
from fairway.base.specs import build
from fairway.data import Corpus, DataSpec, Tokenizer, TokenizerSpec, build_tokenizer, tokenize
from fairway.data import tokenizer as module
from fairway.data.cased import Cased
from fairway.data.learning import train
from fairway.data.transforms.case import SYMBOLS, apply
from tests.data.test_tokenizer import HARD

SPEC = build(TokenizerSpec, {"vocab": 450, "transform": "case"})
WORDS = [*SYMBOLS, "A", "b", "THE", "The", "iPhone", "McD", "Ǆ", "ǅ", "É", "ß", "İ", "ﬁ", " ", "▁", "\n", "\0", "\x1a"]
texts = st.one_of(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60),
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=3)), max_size=20).map(
        lambda parts: "".join(parts).encode("utf-8", "ignore").decode()
    ),
)


def undone(text: str) -> str:
    """The inverse, written apart: one character after another."""
    found, at, everything, one = [], 0, False, False
    while at < len(text):
        character = text[at]
        if character == "\ue004":
            at += 1
            character, everything, one = text[at], False, False
        elif character in SYMBOLS:
            everything, one = character == "\ue002", character in "\ue001\ue003"
            at += 1
            continue
        elif not re.fullmatch("[A-Za-z]", character):
            everything = False
        found.append(character.upper() if everything or one else character)
        one = False
        at += 1
    return "".join(found)


@pytest.fixture(scope="module")
def cased(source_text) -> Tokenizer:
    return Tokenizer.from_bytes(train([source_text, b"The IPO of McDonald"], SPEC))


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("small stays", "small stays"),
        ("The", "\ue001the"),
        ("I", "\ue001i"),
        ("NATO", "\ue002nato"),
        ("iPhone", "i\ue003phone"),
        ("McDonald", "\ue001mc\ue003donald"),
        ("ABc", "\ue001a\ue003bc"),
        ("ÉCOLE", "É\ue002cole"),
        ("ǅungla İ", "ǅungla İ"),
        ("A1B", "\ue001a1\ue001b"),
        ("\ue001the \ue004", "\ue004\ue001the \ue004\ue004"),
    ],
)
def test_the_operators_are_those_of_the_source(text, becomes):
    assert apply(text) == becomes


@settings(max_examples=500, deadline=None)
@given(texts)
def test_any_text_comes_back_from_its_transform_and_holds_no_capital(text):
    changed = apply(text)
    assert undone(changed) == text
    assert not re.search("[A-Z]", changed)


def test_every_character_of_unicode_comes_back(cased):
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert undone(apply(text)) == text
    data = text[:0x12000].encode()
    assert cased.decode(cased.encode(data)) == data


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=100), texts.map(str.encode)))
@example("\ue004\ue004\ue001A\ue002BC".encode())
def test_any_bytes_come_back_and_each_is_counted_once(cased, data):
    tokens = cased.encode(data)
    assert cased.decode(tokens) == data
    lengths = cased.byte_lengths(tokens, np.append(cased.bos, tokens)[:-1])
    assert int(lengths.sum()) == len(data)
    assert not lengths[cased._operator[tokens]].any(), "operators are no text"


@pytest.mark.parametrize("data", HARD)
def test_hard_bytes_come_back(cased, data):
    assert cased.decode(cased.encode(data)) == data


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 449), st.sampled_from([1, 2, 3, 4, 5])), max_size=40), st.integers(0, 40))
def test_any_tokens_decode_to_as_many_bytes_as_are_counted_in_one_part_or_two(cased, tokens, cut):
    """What a model draws, or another tool wrote: escapes in rows, operators before nothing, BOS within a word."""
    whole = cased.decode(tokens, previous=cased.bos)
    before = [cased.bos, *tokens][:-1] if tokens else []
    assert int(cased.byte_lengths(tokens, before).sum()) == len(whole)
    head, tail = tokens[:cut], tokens[cut:]
    assert cased.decode(head, previous=cased.bos) + cased.decode(tail, previous=[cased.bos, *head]) == whole


def test_operators_escaped_by_others_are_text(cased):
    """The escapes of the source's own tokenizers; ours writes byte pieces instead."""
    title, capitals, _, escape = cased._ids.values()
    a = cased.encode(b"a").tolist()
    assert cased.decode([escape, title, *a]) == "\ue001a".encode()
    assert cased.decode([escape, escape, title, *a]) == "\ue004A".encode()
    assert cased.decode([capitals, *a, *a, escape, capitals, *a]) == "AA\ue002a".encode()
    assert cased.byte_lengths([escape, escape, title], [cased.bos, escape, escape]).tolist() == [0, 3, 0]
    assert escape not in cased.encode("\ue001\ue004".encode())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["The", "ABC", "x", " ", "\n", "iP", "1", ".", "\ue001", "é"]), max_size=50))
def test_cutting_a_long_text_changes_no_token(cased, parts):
    data = "".join(parts).encode()
    whole = cased.encode(data).tolist()
    before, module._CHUNK = module._CHUNK, 4
    try:
        assert cased.encode(data).tolist() == whole
    finally:
        module._CHUNK = before


def test_a_run_of_capitals_reaches_over_blocks_of_tokens(cased, monkeypatch):
    data = b"x" + b"QWERTY" * 300 + b" end"
    monkeypatch.setattr("fairway.data.cased._BLOCK", 7)
    assert cased.decode(cased.encode(data)) == data


def test_the_model_says_what_it_is_for(cased, tokenizer):
    assert type(Tokenizer.from_bytes(cased.model)) is Cased
    assert type(Tokenizer.from_bytes(tokenizer.model)) is Tokenizer


def test_private_characters_of_a_text_make_no_case_tokenizer():
    """U+E001 as an ordinary piece: learned from a text that holds it."""
    text = "\ue001 and \ue002 are used here as icons, \ue001\ue001 often \ue004 \ue003 " * 50
    learned = Tokenizer.from_bytes(train([text.encode()], TokenizerSpec(vocab=300, coverage=1.0)))
    assert type(learned) is Tokenizer
    assert any("\ue001".encode() in piece for piece in learned.pieces)
    assert learned.decode(learned.encode(text.encode())) == text.encode()


def test_a_recipe_that_says_something_else_than_the_model_is_refused(cased, tokenizer, tmp_path):
    for made, told in ((cased, "none"), (tokenizer, "case")):
        (tmp_path / "t.model").write_bytes(made.model)
        spec = build(TokenizerSpec, {"vocab": made.size, "model": str(tmp_path / "t.model"), "transform": told})
        with pytest.raises(RecipeError, match=rf"data\.tokenizer\.transform = '{told}': .*set that"):
            build_tokenizer(DataSpec(tokenizer=spec), Corpus("train", (b"text",)))


def test_a_model_with_some_of_the_operators_is_refused(monkeypatch, source_text):
    monkeypatch.setattr("fairway.data.transforms.case.SYMBOLS", SYMBOLS[:2])
    with pytest.raises(DataError, match="some of the four case operators"):
        Tokenizer.from_bytes(train([source_text], SPEC))


def test_the_bytes_of_a_corpus_are_those_of_its_text(cased, source_text):
    documents = (source_text, b"SHOUTED Words And \xff", b"")
    tokens = tokenize(Corpus("valid", documents), cased)
    assert (tokens.text, tokens.decoded) == (b"".join(documents), False)


def test_small_and_capital_words_share_pieces(cased):
    one, other = (cased.encode(word)[-1] for word in (b" self", b"SELF"))
    assert b"self" in cased.pieces[one] + cased.pieces[other]
    assert not any(re.search(b"[A-Z]", piece) for piece in cased.pieces[2 + 4 + 256 :])
