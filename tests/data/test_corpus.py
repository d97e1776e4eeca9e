"""Which text may be trained on: held-out text never, dev only where the recipe does not tune on it."""

import pytest

from fairway.base.errors import DataError, HonestyError
from fairway.base.specs import build
from fairway.data import DataSpec, open_corpus
from fairway.data.splits import divide_dev, overlap


def spec_of(tmp_path, content, held_out, **source):
    (tmp_path / "c").write_bytes(content)
    table = {"source": {"kind": "text", **source}, "path": str(tmp_path / "c"), "held_out": held_out}
    return build(DataSpec, table)


def test_dev_is_the_last_twentieth_of_training(tmp_path):
    text = bytes(i % 251 for i in range(10_000))
    spec = spec_of(tmp_path, text, "dev", valid_fraction=0.2)
    train, dev, valid = (open_corpus(spec, split) for split in ("train", "dev", "valid"))
    assert (train.bytes, dev.bytes, valid.bytes) == (7600, 400, 2000)
    assert b"".join(train.documents + dev.documents + valid.documents) == text
    assert (train.split, dev.split, valid.split) == ("train", "dev", "valid")


def test_dev_is_part_of_training_when_validation_is_scored(tmp_path):
    spec = spec_of(tmp_path, bytes(1000), "valid", valid_fraction=0.2)
    assert open_corpus(spec, "train").bytes == 800
    with pytest.raises(HonestyError, match="held_out = dev"):
        open_corpus(spec, "dev")


def test_dev_takes_whole_documents_where_documents_are_whole():
    documents = [b"x" * 10 for _ in range(50)]
    rest, dev = divide_dev(documents, cuts_documents=False)
    assert (len(rest), len(dev)) == (47, 3)  # 25 bytes are wanted: the fewest documents that hold as much
    rest, dev = divide_dev(documents, cuts_documents=True)
    assert (len(rest), [len(document) for document in dev]) == (48, [5, 10, 10])


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("sizes", [[1], [1000], [1, 1000], [1000, 1], [0, 0], [], [10] * 7, [3, 500, 20, 1, 1]])
def test_dev_loses_and_doubles_nothing(sizes, cuts):
    documents = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    rest, dev = divide_dev(documents, cuts)
    assert b"".join(rest + dev) == b"".join(documents)


def test_overlap_names_the_held_out_documents():
    assert overlap([b"a", b"b", b"c"], [b"x", b"b", b"y", b"a"]) == [1, 3]


def test_a_dev_split_without_text_is_refused(tmp_path):
    spec = spec_of(tmp_path, b"ab", "dev", valid_fraction=0.5)
    with pytest.raises(DataError, match="no dev text"):
        open_corpus(spec, "dev")


def test_opening_twice_gives_the_same_text(tmp_path):
    spec = spec_of(tmp_path, b"the same text " * 99, "valid")
    assert open_corpus(spec, "train").sha256 == open_corpus(spec, "train").sha256
    assert open_corpus(spec, "train").describe()["bytes"] == open_corpus(spec, "train").bytes
