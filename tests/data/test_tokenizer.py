"""The tokenizer's promise: any bytes come back, and every byte is counted once."""

import re
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.data import Corpus, DataSpec, Tokenizer, TokenizerSpec, build_tokenizer, learning, open_corpus, tokenize
from fairway.data import tokenizer as module
from fairway.data.learning import train

HARD = [
    b"",
    b" ",
    b"  leading and trailing  ",
    "▁ is not a space, ▁▁ neither".encode(),
    b"\x00\x01 NUL \x00\x00",
    b"\xff\xfe\xc3\x28 invalid \xe2\x96",
    b"\xed\xa0\x80 a surrogate in UTF-8",
    b"line\r\nends\r\r\n\n\n\ttab\t\t",
    "<s></s><unk><0x41> ⁇ ▅ \ufffd \ufeff".encode(),
    "ﬁ ① Ａ e\u0301 é \u3000 \u00a0 𝔘 😀 漢字".encode(),
    bytes(range(256)),
]


@pytest.mark.parametrize("data", HARD)
def test_hard_bytes_come_back(tokenizer, data):
    assert tokenizer.decode(tokenizer.encode(data)) == data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
@example(b"\xe2\x96\x81 ")
def test_any_bytes_come_back_and_are_counted(tokenizer, data):
    _comes_back_and_is_counted(tokenizer, data)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\n\t\0▅<>s")), max_size=100))
def test_any_text_comes_back_and_is_counted(tokenizer, text):
    _comes_back_and_is_counted(tokenizer, text.encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([b"the", b" ", b"\n", b"    ", b"self.", b"\xff", "▁".encode(), b"\0"]), max_size=40))
def test_mixtures_of_words_spaces_and_odd_bytes_come_back(tokenizer, parts):
    _comes_back_and_is_counted(tokenizer, b"".join(parts))


def _comes_back_and_is_counted(tokenizer, data):
    tokens = tokenizer.encode(data)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens, previous=tokenizer.bos) == data
    previous = np.concatenate(([tokenizer.bos], tokens))[:-1]
    assert int(tokenizer.byte_lengths(tokens, previous).sum()) == len(data)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=50), st.integers(0, 50))
def test_decoding_in_two_parts_is_decoding_in_one(tokenizer, tokens, cut):
    head, tail = tokens[:cut], tokens[cut:]
    previous = head[-1] if head else None
    assert tokenizer.decode(head) + tokenizer.decode(tail, previous=previous) == tokenizer.decode(tokens)


def test_line_ends_and_indentation_have_pieces(tokenizer):
    assert b"\n" in b"".join(tokenizer.pieces[2:][256:])
    assert any(re.fullmatch(rb" {4,}", piece) for piece in tokenizer.pieces)
    assert tokenizer.encode(b" " * 16).tolist() != tokenizer.encode(b" ").tolist() * 16


CORPORA = {
    "chinese": "".join(chr(0x4E00 + i * i % 301) for i in range(9000)),  # more characters than pieces, and no space
    "reserved": "<s> <unk> <0x41> </s> \ufeff hello world " * 99,
    "refused": "▅▅ ▁▁ \0 some words" * 99,
    "tabs": "a\tb\tcd\t\tcd\n" * 99,
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("across_words", [True, False])
def test_whatever_it_learned_from_any_bytes_come_back(name, across_words):
    text = CORPORA[name] + "the quick brown fox jumps over the lazy dog, and so on and on"
    text = text.replace(" ", "") if name == "chinese" else text
    learned = Tokenizer(train([text.encode()], TokenizerSpec(vocab=300, across_words=across_words)))
    for data in (*HARD, text.encode(), *(other.encode() for other in CORPORA.values())):
        _comes_back_and_is_counted(learned, data)


def test_training_twice_gives_the_same_model(source_text):
    spec = TokenizerSpec(vocab=320, sample_bytes=50_000)
    assert train([source_text, b"x y z"], spec) == train([source_text, b"x y z"], spec)


def test_a_sample_reaches_into_every_part_of_the_text():
    documents = [bytes([65 + i]) * 70_000 for i in range(20)]
    sample = list(learning._sample(documents, 400_000))
    assert 400_000 <= sum(map(len, sample)) <= 500_000
    places = sorted({ord(text[0]) - 65 for text in sample})
    assert places[0] == 0
    assert places[-1] >= 16
    assert max(b - a for a, b in pairwise(places)) <= 4
    assert b"".join(text.encode() for text in learning._sample(documents, 10**9)) == b"".join(documents)


def test_a_tokenizer_travels_in_its_model(tokenizer, source_text):
    again = Tokenizer.from_bytes(tokenizer.model)
    assert again.sha256 == tokenizer.sha256
    assert np.array_equal(again.encode(source_text), tokenizer.encode(source_text))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["def ", "self", "\n\n    ", "▁", "漢", "é", "\xad", ".", " return", '"""']), max_size=60)
)
def test_cutting_a_long_text_changes_no_token(tokenizer, parts):
    """Against one call of SentencePiece on the whole text, with chunks of 8 bytes instead of 32 KB."""
    text = "".join(parts).replace("▁", "_")
    whole = tokenizer._sp.encode(text)
    before, module._CHUNK = module._CHUNK, 8
    try:
        assert tokenizer.encode(text.encode()).tolist() == whole
    finally:
        module._CHUNK = before


def test_cutting_real_text_changes_no_token(tokenizer, source_text):
    assert tokenizer.encode(source_text * 3).tolist() == tokenizer._sp.encode((source_text * 3).decode())
    chunks = list(tokenizer._chunks(source_text * 3))
    assert len(chunks) > 5
    assert b"".join(chunks) == source_text * 3


def test_documents_are_encoded_apart(tokenizer):
    documents = [b"one ", b"", b" two\xff", b"three" * 20_000, b"\n"]
    together = list(tokenizer.encode_documents(documents))
    assert len(together) == len(documents)
    for document, tokens in zip(documents, together, strict=True):
        assert np.array_equal(tokens, tokenizer.encode(document))


def test_bytes_are_the_pieces_own_and_agree_with_sentencepiece(tokenizer):
    """Against sentencepiece's own decoder, for pieces that are text."""
    for token in range(2 + 256, tokenizer.size):
        assert tokenizer.pieces[token].decode() == tokenizer._sp.decode([tokenizer._sp.piece_to_id("a"), token])[1:]
        assert tokenizer.base[token] + tokenizer.lead[token] == len(tokenizer.pieces[token])
    assert tokenizer.boundary[[0, tokenizer.bos]].all()
    assert not tokenizer.boundary[2:].any()


def test_a_foreign_token_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"token 400 at position 1: .*400 pieces"):
        tokenizer.decode([5, 400])


def test_held_out_text_cannot_teach_the_tokenizer():
    for split in ("valid", "dev"):
        with pytest.raises(HonestyError, match=split):
            build_tokenizer(DataSpec(), Corpus(split, (b"some text",)))


def test_too_little_text_for_the_vocabulary_is_one_line():
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab") as caught:
        train([b"abc"], TokenizerSpec(vocab=1024))
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_model_is_named(tmp_path):
    spec = TokenizerSpec(model=str(tmp_path / "absent.model"))
    with pytest.raises(DataError, match=r"absent\.model"):
        build_tokenizer(DataSpec(tokenizer=spec), Corpus("train", (b"text",)))
    (tmp_path / "bad.model").write_bytes(b"\xffnot a model" * 9)
    with pytest.raises(DataError, match=r"bad\.model: no SentencePiece model"):
        build_tokenizer(
            DataSpec(tokenizer=TokenizerSpec(model=str(tmp_path / "bad.model"))), Corpus("train", (b"text",))
        )


def test_a_stated_vocabulary_must_be_the_models(tmp_path, tokenizer):
    (tmp_path / "small.model").write_bytes(tokenizer.model)
    spec = TokenizerSpec(vocab=1024, model=str(tmp_path / "small.model"))
    with pytest.raises(RecipeError, match=r"data\.tokenizer\.vocab = 400"):
        build_tokenizer(DataSpec(tokenizer=spec), Corpus("train", (b"text",)))


@pytest.mark.parametrize(
    "values", [{"vocab": 100}, {"vocab": 70_000}, {"coverage": 0.0}, {"sample_bytes": 0}, {"longest_piece": 0}]
)
def test_impossible_tokenizers_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TokenizerSpec(**values)


@pytest.fixture(scope="module")
def challenge(shared_data):
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    return Tokenizer(model.read_bytes(), name=model.name)


def test_the_challenges_tokenizer_is_refused_on_text_it_changes(challenge):
    corpus = Corpus("valid", (b"nothing to change here", b"a line\nanother"))
    with pytest.raises(DataError, match=r"fineweb_1024_bpe\.model: lossy on document 1, byte 6: .*score_decoded"):
        tokenize(corpus, challenge)


def test_the_text_that_a_lossy_tokenizer_decodes_to_is_scored_and_said(challenge):
    """Against sentencepiece's own decoder."""
    documents = ("  two  spaces\nand ﬁ\n".encode(), "Ａ line".encode())
    tokens = tokenize(Corpus("valid", documents), challenge, "score_decoded")
    decoded = "".join(challenge._sp.decode(challenge._sp.encode(text.decode())) for text in documents).encode()
    assert tokens.decoded
    assert tokens.text == decoded == b"two spaces and fiA line"
    assert tokens.text_bytes == len(decoded)


def test_the_challenges_byte_table_is_reproduced(challenge):
    """Against the formula of the challenge's scripts, written out piece by piece."""
    sp: sentencepiece.SentencePieceProcessor = challenge._sp
    tokens = [1, *sp.encode("Ünder the tree ☃ 12"), 1, *sp.encode("again")]
    expected = []
    for before, token in pairwise(tokens):
        piece = sp.id_to_piece(token)
        if sp.is_control(token) or sp.is_unknown(token):
            expected.append(0)
        elif sp.is_byte(token):
            expected.append(1)
        else:
            space = piece.startswith("▁") and not (sp.is_control(before) or sp.is_unknown(before))
            expected.append(len(piece.removeprefix("▁").encode()) + space)
    assert challenge.byte_lengths(tokens[1:], tokens[:-1]).tolist() == expected


def test_the_embedded_corpus_survives(tokenizer):
    valid = open_corpus(DataSpec(), "valid")
    assert tokenize(valid, tokenizer).text == b"".join(valid.documents)
