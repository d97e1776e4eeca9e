"""Folded text: what Python's own case folding and splitting give, for any bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data.overlap import folded, key_of

ANY = st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
WHITE = st.text(alphabet=" \t\n\r\v\f\x1c\x1f\x85\xa0\u2003\u3000aÄßKſΣς\u200b", max_size=40).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(st.one_of(ANY, WHITE))
def test_it_is_casefold_and_split(document):
    text = document.decode("utf-8", "surrogateescape").casefold()
    assert folded(document) == " ".join(text.split()).encode("utf-8", "surrogateescape")


def test_every_character_folds_as_unicode_says():
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000 and (chr(code).casefold() != chr(code) or chr(code).isspace()):
            expected = " ".join(f"x{chr(code)}y".casefold().split()).encode()
            assert folded(f"X{chr(code)}Y".encode()) == expected, hex(code)


@pytest.mark.parametrize(
    ("left", "right"), [("A b\n\nC", " a  B c\t"), ("STRASSE", "straße"), ("a\u00a0b", "A B"), ("", " \n")]
)
def test_the_same_text_has_one_key(left, right):
    assert key_of(left.encode()) == key_of(right.encode())


def test_other_words_have_another_key():
    assert len({key_of(text) for text in (b"a b", b"ab", b"a c", b"a b.", b"a-b", b"")}) == 6
