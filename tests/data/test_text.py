"""Text of one's own: packed or plain, divided by bytes or documents."""

import bz2
import gzip
import hashlib
import lzma
import sys

import pytest

from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.specs import build
from fairway.data import DataSpec, open_corpus
from fairway.data.sources import text
from fairway.data.splits import share_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = b"".join(b"line %d of a text\n" % i for i in range(1000))
PACKERS = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd.compress}


def data_spec(path, **source):
    return build(DataSpec, {"source": {"kind": "text", **source}, "path": str(path)})


@pytest.mark.parametrize("suffix", ["", ".txt", *PACKERS])
def test_packed_text_is_the_text(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(PACKERS.get(suffix, bytes)(TEXT))
    train, valid = (open_corpus(data_spec(path), split) for split in ("train", "valid"))
    tail = len(TEXT) // 10
    assert train.documents + valid.documents == (TEXT[:-tail], TEXT[-tail:])


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped"])
def test_damaged_packed_text_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"corpus{suffix}"
    packed = bytearray(PACKERS[suffix](hashlib.shake_128(b"x").digest(50_000)))
    packed[len(packed) // 2] ^= 0xFF if damage == "flipped" else 0
    path.write_bytes({"cut": packed[: len(packed) // 2], "empty": b"", "garbage": b"no such"}.get(damage, packed))
    if (suffix, damage) == (".zst", "flipped") and _without_checksum(path):
        pytest.skip("this zstd file has no checksum")
    with pytest.raises(DataError, match=f"corpus{suffix}") as caught:
        open_corpus(data_spec(path), "train")
    assert "\n" not in str(caught.value)


def _without_checksum(path):
    try:
        zstd.decompress(path.read_bytes())
    except zstd.ZstdError:
        return False
    return True


def test_ranges_of_bytes_are_taken_exactly(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXT)
    spec = data_spec(path, train=[100, 5000], valid=[6000, 7000])
    assert open_corpus(spec, "train").documents == (TEXT[100:5000],)
    assert open_corpus(spec, "valid").documents == (TEXT[6000:7000],)


@pytest.mark.parametrize(
    ("train", "valid"), [([0, 10], [9, 20]), ([5, 6], [0, 100]), ([10, 10], [20, 30]), ([-1, 5], [6, 7])]
)
def test_overlapping_or_empty_ranges_are_refused(train, valid):
    with pytest.raises(RecipeError, match=r"data\.source|overlap|range"):
        data_spec("x", train=train, valid=valid)


def test_an_overlap_with_the_default_tail_is_refused(tmp_path):
    (tmp_path / "c").write_bytes(TEXT)
    with pytest.raises(RecipeError, match="overlap"):
        open_corpus(data_spec(tmp_path / "c", train=[0, len(TEXT)]), "train")


def test_a_range_beyond_the_text_is_refused(tmp_path):
    (tmp_path / "c").write_bytes(TEXT)
    with pytest.raises(DataError, match=rf"valid = \[100, 999999\] is no part of its {len(TEXT):,} bytes"):
        open_corpus(data_spec(tmp_path / "c", valid=[100, 999_999]), "train")


def test_a_separator_opens_documents_and_nothing_is_lost(tmp_path):
    (tmp_path / "c").write_bytes(b"head\n<doc 1>\na<doc 2>\nb<doc 3>\nc")
    spec = data_spec(tmp_path / "c", separator="<doc ", train=[0, 22], valid=[22, 32])
    assert open_corpus(spec, "train").documents == (b"head\n", b"<doc 1>\na", b"<doc 2>\n")
    assert open_corpus(spec, "valid").documents == (b"b", b"<doc 3>\nc"[:9])


def test_documents_are_divided_by_the_hash_of_their_content(tmp_path):
    for i in range(200):
        folder = tmp_path / "folder" / f"{i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_bytes(b"document %d" % (i // 2))  # each content twice
    (tmp_path / "folder" / ".hidden").write_bytes(b"not text of ours")
    spec = data_spec(tmp_path / "folder", by="documents", valid_fraction=0.2)
    train, valid = open_corpus(spec, "train").documents, open_corpus(spec, "valid").documents
    assert len(train) + len(valid) == 200
    assert not set(train) & set(valid)
    assert all(share_of(document) < 0.2 for document in valid)
    assert 10 <= len(valid) <= 80


def test_one_document_cannot_be_divided_by_documents(tmp_path):
    (tmp_path / "c").write_bytes(TEXT)
    with pytest.raises(DataError, match="separator"):
        open_corpus(data_spec(tmp_path / "c", by="documents"), "train")


def test_held_out_documents_among_more_training_text_are_refused(tmp_path):
    (tmp_path / "main").write_bytes(b"".join(b"#%03d some text" % i for i in range(100)))
    (tmp_path / "more").write_bytes(b"#500 other text#095 some text#501 other text")
    spec = data_spec(tmp_path / "main", separator="#", more=[str(tmp_path / "more")])
    for split in ("train", "valid"):
        with pytest.raises(HonestyError, match="1 held-out document"):
            open_corpus(spec, split)
    (tmp_path / "more").write_bytes(b"#500 other text")
    assert open_corpus(spec, "train").documents[-1] == b"#500 other text"


def test_missing_and_empty_corpora_are_one_line(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, words in (("absent.txt", "no such file"), ("empty.txt", "no text in it"), ("folder", "no text in it")):
        with pytest.raises(DataError, match=f"{path}: {words}") as caught:
            open_corpus(data_spec(tmp_path / path), "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"data\.path: not set"):
        open_corpus(data_spec(""), "train")


def test_shards_are_not_read_as_text(tmp_path):
    (tmp_path / "x.bin").write_bytes((20240520).to_bytes(4, "little") + bytes(2000))
    with pytest.raises(DataError, match=r"data\.source = shards"):
        open_corpus(data_spec(tmp_path), "train")


def test_the_measured_text_is_the_one_in_the_readme(shared_data):
    spec = data_spec(shared_data / "tinyshakespeare.txt")
    train, valid = open_corpus(spec, "train"), open_corpus(spec, "valid")
    assert (train.bytes, valid.bytes) == (1_003_855, 111_539)
    whole = hashlib.sha256(b"".join(train.documents + valid.documents)).hexdigest()
    assert whole == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@pytest.mark.slow
def test_a_hundred_megabytes_are_divided_as_published(shared_data):
    spec = data_spec(shared_data / "wiki100.bin.xz", train=[0, 90_000_000], valid=[90_000_000, 95_000_000])
    assert open_corpus(spec, "train").sha256 == "dc9809251af8b869bd3b6c3714bf425f01f2c24f320c0416494fc7f09362905c"
    assert open_corpus(spec, "valid").sha256 == "951bca4d150dad2198bd999dd6220e8691591c9dbd1fb7e1af0bc466ac0d07d4"
    assert text.Spec is type(spec.source)
