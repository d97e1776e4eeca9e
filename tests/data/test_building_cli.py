"""`fairway data build`, `join`, `tokenizer train`, `tokenizer compare` as a person and a program meet them."""

import json

import pytest

from fairway.data.building import reading
from tests.test_cli import one_line


@pytest.fixture
def place(tmp_path, source_text, tokenizer):
    (tmp_path / "text.txt").write_bytes(source_text[:40_000])
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    return tmp_path


def build(fairway, place, *more, out="out"):
    words = ["data", "build", place / "text.txt", "-o", place / out, "--tokenizer", place / "t.model"]
    return fairway(*words, "--separator", "def ", "--workers", 1, *more)


@pytest.mark.parametrize("verb", ["", "build", "join", "tokenizer", "tokenizer train", "tokenizer compare"])
def test_every_verb_explains_itself(fairway, verb):
    answer = fairway("data", *verb.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "Usage:" in answer.out


def test_a_build_ends_in_a_table_or_in_json(fairway, place):
    found = json.loads(build(fairway, place, "--json", "--valid-documents", 3).out)
    assert found["splits"]["val"]["documents"] == 3
    assert found["folder"] == str(place / "out")
    assert found["code"]
    answer = build(fairway, place, "--valid-documents", 3)
    assert answer.code == 0
    assert "built already" in answer.err
    for words in ("train", "val", "3 documents", "bytes each", found["source"]["sha256"][:16]):
        assert words in answer.out


def test_parts_are_built_and_joined(fairway, place, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 4096)
    whole = json.loads(build(fairway, place, "--json").out)
    for part in ("1/2", "2/2"):
        assert build(fairway, place, "--part", part, out=f"part{part[0]}").code == 0
    answer = fairway("data", "join", place / "part2", place / "part1", "-o", place / "joined", "--json")
    joined = json.loads(answer.out)
    for found in (whole, joined):
        del found["folder"], found["seconds"]
    assert joined == whole


def test_mistakes_are_one_line(fairway, place):
    assert one_line(build(fairway, place, "--part", "2"), 2, "--part '2': write it as 2/8")
    assert one_line(build(fairway, place, "--part", "3/2"), 2, "--part 3/2")
    assert one_line(build(fairway, place, "--format", "pdf"), 2, "--format 'pdf': choices: auto, text, jsonl, parquet")
    (place / "text.txt").unlink()
    assert one_line(build(fairway, place), 1, "text.txt: No such file")
    (place / "t.model").write_bytes(b"\xffno model" * 9)
    assert one_line(build(fairway, place), 1, "t.model: no SentencePiece model")
    assert one_line(fairway("data", "join", place, "-o", place / "x"), 1, "manifest.json: No such file")


def test_a_tokenizer_is_trained_and_compared(fairway, place):
    words = ["data", "tokenizer", "train", place / "text.txt", "-o", place / "new.model", "--separator", "def "]
    told = json.loads(fairway(*words, "--vocab", 350, "--json").out)
    assert (told["pieces"], told["lossless"]) == (350, True)
    assert told["sample_bytes"] == told["train_bytes"]
    answer = fairway(*words, "--vocab", 260)
    assert "260 pieces" in answer.out
    assert "no room for byte pieces" in answer.out
    assert one_line(fairway(*words, "--vocab", 70_000), 2, "vocab = 70000: 256 to 65,536 pieces are possible")
    models = [place / "t.model", place / "new.model"]
    answer = fairway("data", "tokenizer", "compare", *models, "--text", place / "text.txt", "--separator", "def ")
    assert answer.code == 0
    for heading in ("bytes/token", "tokens/word", "MB/s", "lost", "bits/byte", "t.model", "new.model", "4-gram"):
        assert heading in answer.out
    rows = json.loads(
        fairway(
            "data", "tokenizer", "compare", *models, "--text", place / "text.txt", "--separator", "def ", "--json"
        ).out
    )["rows"]
    assert [row["pieces"] for row in rows] == [400, 260]
