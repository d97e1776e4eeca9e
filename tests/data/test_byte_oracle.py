"""The byte oracle: every known miscount of RULES.md, made on purpose, is refused, and the token is named.

Each table here is the one that a withdrawn or corrected submission had. None may reach a score: neither through the run
(`tokenize`), nor through a file (`evaluate`), nor through token shards.
"""

import hashlib

import numpy as np
import pytest

from fairway.artifact import open_artifact
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.base.specs import build
from fairway.data import Corpus, Tokenizer, TokenizerSpec, Tokens, check_bytes, count_bytes, tokenize
from fairway.data.building import sidecar
from fairway.data.learning import train
from fairway.data.sources.shards import open_shard, write_shard
from fairway.data.transforms.case import apply
from fairway.score.evaluate import byte_lengths

DOCUMENTS = ("The cat — the café on the mat\n".encode(), b" THE END, said iPhone users", b"\xff 12")


@pytest.fixture(scope="module")
def cased(source_text) -> Tokenizer:
    return Tokenizer.from_bytes(train([source_text], build(TokenizerSpec, {"vocab": 420, "transform": "case"})))


class Wrong(Tokenizer):
    """A tokenizer whose byte table is another's: `byte_lengths` is what a score divides by."""

    def table(self, right, ids, before):
        raise NotImplementedError

    def byte_lengths(self, tokens, previous):
        ids, before = np.asarray(tokens, dtype=np.int64), np.asarray(previous, dtype=np.int64)
        return self.table(super().byte_lengths(ids, before), ids, before)

    def decode(self, tokens, previous=None):
        """The text itself is decoded rightly: these submissions miscounted, they did not misread."""
        return Tokenizer(self.model).decode(tokens, previous)


class SpaceTwice(Wrong):
    """#1545, #1576, #1632, #1672, #1698, #1734: +1 for a leading space in the table, and again in the loop."""

    def table(self, right, ids, before):
        return right + (self.lead[ids] & ~self.boundary[before])


class Replacement(Wrong):
    """#1143, #1184, #1289: a fallback byte decoded alone is U+FFFD, which is three bytes."""

    def table(self, right, ids, before):
        found = [len(self.pieces[token].decode("utf-8", "replace").encode()) for token in ids]
        return np.where(right == 1, found, right)


class SpaceMark(Wrong):
    """#897, #755: a tokenizer whose space mark is not known as one, so that ▁ counts as the three bytes it has."""

    def table(self, right, ids, before):
        return right + 2 * np.array([self.pieces[token].count(b" ") for token in ids])


class NoSpace(Wrong):
    """The leading space, forgotten altogether."""

    def table(self, right, ids, before):
        return right - self.lead[ids]


class Constant(Wrong):
    """#1106: so many bytes for every token."""

    def table(self, right, ids, before):
        return np.full(len(ids), 4)


class Pieces(Wrong):
    """BOS counted as the text of its name."""

    def table(self, right, ids, before):
        return np.where(ids == self.bos, 3, right)


TABLES = [SpaceTwice, Replacement, SpaceMark, NoSpace, Constant, Pieces]


def first_wrong(right: Tokenizer, wrong: Tokenizer, tokens) -> int:
    """Where the tables differ first, found by comparing them: the oracle has to find it by the text."""
    ids, before = tokens[1:], tokens[:-1]
    return 1 + int(np.argmax(right.byte_lengths(ids, before) != wrong.byte_lengths(ids, before)))


@pytest.mark.parametrize("table", TABLES)
def test_a_known_miscount_stops_the_run_and_the_token_is_named(table, tokenizer):
    wrong, text = table(tokenizer.model), b"".join(DOCUMENTS)
    tokens = tokenize(Corpus("valid", DOCUMENTS), tokenizer).tokens
    assert count_bytes(tokens, wrong) != len(text)
    at = first_wrong(tokenizer, wrong, tokens)
    with pytest.raises(DataError) as caught:
        tokenize(Corpus("valid", DOCUMENTS), wrong)
    said = str(caught.value)
    assert f"token {tokens[at]} at position {at} is counted as" in said
    assert "\n" not in said


@pytest.mark.parametrize("table", TABLES)
def test_however_far_into_a_long_text_it_stands(table, tokenizer, source_text):
    """The wrong table is right for the first 100 KB, which need many blocks; then the first wrong token is found."""
    start = len(tokenizer.encode(source_text[:100_000]))

    class Late(table):
        def table(self, right, ids, before):
            return right if len(ids) < start else np.append(right[:start], super().table(right, ids, before)[start:])

    tokens = tokenize(Corpus("valid", (source_text[:100_000], *DOCUMENTS)), tokenizer).tokens
    right, late = tokenizer.byte_lengths(tokens[1:], tokens[:-1]), table(tokenizer.model)
    shifted = late.byte_lengths(tokens[1:], tokens[:-1])
    assert int(shifted.sum()) != int(right.sum())
    with pytest.raises(DataError, match=r"token \d+ at position \d+ is counted as"):
        check_bytes(tokens, late, source_text[:100_000] + b"".join(DOCUMENTS))


@pytest.mark.parametrize("table", TABLES)
def test_it_cannot_be_scored_through_a_file_either(table, tokenizer):
    """The artifact's tokenizer counts; held-out text with its true bytes is refused, and with the table's sum too."""

    class File:
        vocab = tokenizer.size

    wrong, text = table(tokenizer.model), b"".join(DOCUMENTS)
    File.tokenizer = wrong
    tokens = tokenize(Corpus("valid", DOCUMENTS), tokenizer).tokens
    with pytest.raises(DataError, match=r"token \d+ at position \d+ is counted as"):
        byte_lengths(File, Tokens.of(tokens, "valid", text))
    claimed = count_bytes(tokens, wrong)
    padded = (text + b"x" * max(0, claimed - len(text)))[:claimed]
    assert len(padded) == claimed, "a text invented so that the sums agree"
    with pytest.raises(DataError, match=r"is counted as|tokens are missing"):
        byte_lengths(File, Tokens.of(tokens, "valid", padded))


def test_the_transformed_text_is_no_denominator(cased):
    """#2138: the bytes of the case operators counted, +8.95 % there. Refused, and the first operator is named."""
    tokens, text = tokenize(Corpus("valid", DOCUMENTS), cased).tokens, b"".join(DOCUMENTS)
    transformed = sum(len(cased.pieces[token]) for token in tokens[1:])
    assert transformed > 1.1 * len(text) == 1.1 * count_bytes(tokens, cased)

    class Transformed(type(cased)):
        def byte_lengths(self, tokens, previous):
            return self._lengths[np.asarray(tokens)]

        def decode(self, tokens, previous=None):
            return cased.decode(tokens, previous)

    operator = int(np.flatnonzero(cased._operator[tokens])[0])
    with pytest.raises(DataError, match=rf"token {tokens[operator]} at position {operator} is counted as 3 bytes"):
        tokenize(Corpus("valid", DOCUMENTS), Transformed(cased.model))
    with pytest.raises(DataError, match="is counted as"):
        check_bytes(tokens, cased, apply(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape"))


def test_a_lossy_tokenizer_is_refused_or_its_own_text_is_scored_and_said(shared_data):
    """#1578, #1585, #1670: a text made easier before it is tokenised."""
    name = "fineweb_1024_bpe.model"
    challenge = Tokenizer((shared_data / "tokenizers" / name).read_bytes(), name)
    documents = ("a ﬁne  line\n".encode(),)
    with pytest.raises(DataError, match="lossy on document 0"):
        tokenize(Corpus("valid", documents), challenge)
    scored = tokenize(Corpus("valid", documents), challenge, "score_decoded")
    assert scored.decoded
    assert scored.text_bytes == len(b"a fine line") < len(documents[0])


# Token shards: the bytes of the text that they were made from are known by their sidecar alone.


def shards_of(folder, tokenizer, documents, change=lambda rows: rows):
    """Held-out shards of documents, two of them, with sidecars."""
    halves, made = (documents[:2], documents[2:]), []
    for number, half in enumerate(halves):
        encoded = [np.append(tokenizer.bos, tokenizer.encode(document)) for document in half]
        path = folder / f"fineweb_val_{number:06}.bin"
        write_shard(path, np.concatenate(encoded).astype(np.uint16))
        starts = np.cumsum([0, *map(len, encoded)])[:-1]
        decoded = [tokenizer.decode(tokens[1:], previous=tokenizer.bos) for tokens in encoded]
        keys = [int.from_bytes(hashlib.sha256(document).digest()[:8], "big") for document in half]
        rows = np.array([starts, [*map(len, half)], [*map(len, decoded)], keys], dtype=np.uint64).T
        rows = change(rows)
        sidecar.path_of(path).write_bytes(sidecar.header(len(rows), 4) + rows.astype("<u8").tobytes())
        made.append(open_shard(path))
    return Corpus("valid", shards=tuple(made))


@pytest.mark.parametrize("which", ["tokenizer", "cased"])
def test_shards_whose_sidecar_knows_the_text_are_scored_by_the_original(which, request, tmp_path):
    made, run = request.getfixturevalue(which), Run()
    tokens = tokenize(shards_of(tmp_path, made, DOCUMENTS), made, run=run)
    assert not tokens.decoded, "document for document the hash of the original"
    assert tokens.text == b"".join(DOCUMENTS)
    facts = {key: run.facts["originals"][key] for key in ("documents", "exact", "original_bytes", "decoded_bytes")}
    size = len(tokens.text)
    assert facts == {"documents": 3, "exact": 3, "original_bytes": size, "decoded_bytes": size}


def test_without_a_sidecar_the_bytes_are_those_of_the_decoded_tokens_and_it_is_said(tokenizer, tmp_path):
    corpus = shards_of(tmp_path, tokenizer, DOCUMENTS)
    sidecar.path_of(corpus.shards[1].path).unlink()
    assert tokenize(corpus, tokenizer).decoded


def test_a_lossy_tokenizers_shards_are_scored_as_what_they_decode_to(shared_data, tmp_path):
    name, run = "fineweb_1024_bpe.model", Run()
    challenge = Tokenizer((shared_data / "tokenizers" / name).read_bytes(), name)
    documents = ("a ﬁne  line\n".encode(), b"plain", b"more")
    tokens = tokenize(shards_of(tmp_path, challenge, documents), challenge, run=run)
    assert tokens.decoded
    assert tokens.text == b"a fine lineplainmore"
    assert run.facts["originals"]["exact"] == 2
    assert run.facts["originals"]["original_bytes"] == len(b"".join(documents)) > tokens.text_bytes


def test_text_of_the_same_length_that_is_not_the_original_is_no_original(tokenizer, tmp_path):
    def other(rows):
        rows[0, sidecar.KEY] += np.uint64(1)
        return rows

    assert tokenize(shards_of(tmp_path, tokenizer, DOCUMENTS, other), tokenizer).decoded


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (sidecar.DECODED, "document 0 decodes to 33 bytes, its sidecar says 34"),
        (sidecar.START, "do not begin"),
    ],
)
def test_a_sidecar_of_other_tokens_stops_the_run(column, says, tokenizer, tmp_path):
    def moved(rows):
        rows[0, column] += np.uint64(1)
        return rows

    with pytest.raises(DataError, match=says):
        tokenize(shards_of(tmp_path, tokenizer, DOCUMENTS, moved), tokenizer)


def test_the_oracle_needs_no_table_of_the_submission(tiny_run):
    """A run's own file and text: token by token, the pieces are the text."""
    artifact = open_artifact(tiny_run / "artifact.fw")
    tokenizer, text = artifact.tokenizer, "Naïve “quotes”, TABS\t and\r\n ends ".encode()
    tokens = tokenize(Corpus("valid", (text,)), tokenizer).tokens
    lengths = byte_lengths(artifact, Tokens.of(tokens, "valid", text))
    ends = np.cumsum(lengths)
    for token, end, length in zip(tokens[1:], ends, lengths, strict=True):
        assert text[end - length : end] == tokenizer.decode([token], previous=tokenizer.bos)
