"""The quick encoder's promise: the tokens are SentencePiece's, to the last one, and the text is what they decode to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.specs import build
from fairway.data import Tokenizer, TokenizerSpec
from fairway.data.building import encoding
from fairway.data.building.encoding import Encoder
from fairway.data.learning import train

CHALLENGE = ("fineweb_1024_bpe", "fineweb_4096_bpe", "fineweb_8192_bpe")
HARD = [
    b"",
    b" ",
    b"   \n \t ",
    b"  two  spaces\nand a line, (brackets) 12,345.6 e-mail@example.org\r\n",
    "▁ is no space, ▁▁ neither ▁".encode(),
    "ﬁ ① Ａ e\u0301 \u0301x é \u3000\u00a0 漢字かな 😀 \u200b\ufeff …".encode(),
    b"NUL \x00 and \x01\x7f",
    b"no UTF-8 \xff\xfe a\xc3",
    "“quotes.” ‘and,’ dashes—here–there".encode(),
    ("word" * 100 + " ").encode() * 3,
]


@pytest.fixture(scope="session")
def encoders(source_text):
    """Of learned tokenizers: words apart, across words, with a case transform."""
    specs = {
        "apart": {"across_words": False},
        "across": {"across_words": True},
        "cased": {"across_words": False, "transform": "case"},
    }
    text = source_text[:60_000] + b"and so on and so on " * 500
    return {
        name: Encoder(Tokenizer.from_bytes(train([text], build(TokenizerSpec, {"vocab": 400, **values}))))
        for name, values in specs.items()
    }


def holds(encoder: Encoder, document: bytes) -> None:
    tokenizer, found = encoder.tokenizer, encoder.encode(document)
    expected = tokenizer.encode(document)
    assert found.tokens.tolist() == expected.tolist()
    assert found.text == tokenizer.decode(expected, previous=tokenizer.bos)


@pytest.fixture(scope="session", params=CHALLENGE)
def challenge(request, shared_data):
    model = shared_data / "tokenizers" / f"{request.param}.model"
    return Encoder(Tokenizer(model.read_bytes(), model.name))


@pytest.mark.parametrize("document", HARD)
def test_hard_text_has_the_challenges_own_tokens(challenge, document):
    holds(challenge, document)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\n\0.,”’e\u0301aBc1")), max_size=80))
def test_any_text_has_the_challenges_own_tokens(challenge, text):
    holds(challenge, text.encode())


def test_real_text_has_the_challenges_own_tokens(challenge, source_text, shared_data):
    holds(challenge, source_text)
    holds(challenge, (shared_data / "tinyshakespeare.txt").read_bytes()[:300_000])


def test_the_challenges_tokenizers_go_word_by_word_where_they_have_byte_pieces(challenge):
    assert (challenge.words is not None) == challenge.tokenizer.has_bytes
    assert challenge.tokenizer.has_bytes == ("4096" not in challenge.tokenizer.name)


@pytest.mark.parametrize("name", ["apart", "across", "cased"])
@pytest.mark.parametrize("document", HARD)
def test_hard_text_has_a_learned_tokenizers_own_tokens(encoders, name, document):
    holds(encoders[name], document)


@pytest.mark.parametrize("name", ["apart", "across", "cased"])
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["def", " ", "Self", "\n    ", "▁", "é", "HTTP", ".", "\0", "\ue001", "x"]), max_size=60)
)
def test_any_mixture_has_a_learned_tokenizers_own_tokens(encoders, name, parts):
    holds(encoders[name], "".join(parts).encode())


def test_pieces_that_reach_across_words_are_not_cut(encoders):
    assert encoders["across"].words is None
    assert encoders["apart"].words is not None


def test_a_long_text_is_cut_into_windows_that_change_no_token(challenge, monkeypatch):
    monkeypatch.setattr(encoding, "_WINDOW", 7)
    holds(challenge, "one two  three, (four) fünf\n\n six-seven".encode() * 5)
    assert list(encoding._windows("a▁b▁▁cccccccc▁d▁▁")) == ["a▁b▁▁cccccccc", "▁d▁▁"]
    assert "".join(encoding._windows("▁x" * 40)) == "▁x" * 40


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_long_word_is_cut_where_no_piece_reaches_across(challenge, encoders, monkeypatch, chunk):
    monkeypatch.setattr(encoding, "_CHUNK", chunk)
    for encoder in (challenge, encoders["apart"], encoders["cased"]):
        for document in [*HARD, b"internationalisation--and...so_on 1234567890", ("漢字" * 20).encode()]:
            holds(Encoder(encoder.tokenizer), document)


def test_what_is_remembered_is_bounded_and_changes_nothing(challenge, monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED", 5)
    encoder = Encoder(challenge.tokenizer)
    for document in HARD * 2:
        holds(encoder, document)
    if encoder.words is not None:
        assert len(encoder.words) == 5


def test_a_word_that_does_not_come_back_is_noticed(challenge):
    """A piece table that says something else than the pieces: the text must be decoded, not taken for granted."""
    tokenizer = Tokenizer(challenge.tokenizer.model, challenge.tokenizer.name)
    victim = int(tokenizer.encode(b"in the")[-1])
    tokenizer.pieces[victim] = b"?"
    encoder = Encoder(tokenizer)
    assert np.array_equal(encoder.encode(b"in the end").tokens, challenge.tokenizer.encode(b"in the end"))
    if encoder.words is not None:
        assert not encoder.words.all_come_back
