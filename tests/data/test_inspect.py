"""Inspecting shards: every figure beside a count by hand; the published facts checked, each with a verdict."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError
from fairway.data import Tokenizer, published
from fairway.data.inspecting import histogram, inspect
from fairway.data.published import Published
from fairway.data.shardsets import ShardSet, of_split, shard_sets, tokenizer_beside
from fairway.data.sources.shards import open_shard, write_shard
from fairway.data.splits import Shard
from fairway.data.tokens import count_bytes

TEXTS = [b"A first document.\n", b"", b"second, with  spaces and \xc3\xa9", b"third \xe2\x96\x81 one"]


def stream(tokenizer, texts):
    return np.concatenate([np.append(tokenizer.bos, tokenizer.encode(text)) for text in texts]).astype(np.uint16)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Training shards cut anywhere, a held-out one, their tokenizer."""
    (tmp_path / "t.model").write_bytes(tokenizer.model)
    train = stream(tokenizer, TEXTS * 5)
    for number, part in enumerate(np.split(train, [17, 40])):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", part)
    write_shard(tmp_path / "fineweb_val_000000.bin", stream(tokenizer, [b"held out text", b"and more of it"]))
    return tmp_path


def test_every_figure_is_the_one_counted_by_hand(folder, tokenizer):
    train, valid = shard_sets(folder)
    found = inspect(train, tokenizer, samples=2)
    lengths = [len(tokenizer.encode(text)) for text in TEXTS * 5]
    assert (found.name, found.shards, found.documents, found.empty) == ("fineweb_train", 3, 20, 5)
    assert found.tokens == sum(lengths) + 20
    assert found.bytes == sum(map(len, TEXTS)) * 5
    assert found.bytes_per_token == found.bytes / found.tokens
    assert (found.shortest, found.longest) == (0, max(lengths))
    assert (found.mean, found.median) == (np.mean(lengths), np.median(lengths))
    assert (found.before_first, found.original_bytes) == (0, None)
    assert found.pieces == len(set(stream(tokenizer, TEXTS).tolist()))
    assert sum(count for *_, count in found.lengths) == 20
    assert [(one.number, one.text) for one in found.samples] == [(0, "A first document.\n"), (10, TEXTS[2].decode())]
    assert inspect(valid, tokenizer).documents == 2


@pytest.mark.parametrize("name", ["fineweb_1024_bpe.model", "fineweb_8192_bpe.model", None])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_bytes_are_those_of_the_byte_account(name, data, tokenizer, data_folder_or_none):
    """Any tokens, control pieces and leading spaces in any order; parts cut anywhere. The account counts what follows
    the first token, and a BOS counts nothing."""
    if name and data_folder_or_none is None:
        pytest.skip("the measured data is not here")
    one = Tokenizer((data_folder_or_none / "tokenizers" / name).read_bytes()) if name else tokenizer
    tokens = data.draw(st.lists(st.integers(0, min(one.size, 600) - 1), min_size=1, max_size=80))
    cuts = sorted(data.draw(st.lists(st.integers(1, 79), max_size=3)))
    array = np.array([one.bos, *tokens], np.uint16)
    shards = tuple(Shard(None, part) for part in np.split(array, cuts) if len(part))
    assert inspect_bytes(shards, one) == count_bytes(array, one)


def inspect_bytes(shards, tokenizer):
    from pathlib import Path

    return inspect(ShardSet("x", tuple(Shard(Path("x.bin"), s.tokens) for s in shards)), tokenizer, samples=0).bytes


@pytest.fixture(scope="module")
def data_folder_or_none():
    import os
    from pathlib import Path

    folder = Path(os.environ.get("FAIRWAY_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    return folder if folder.is_dir() else None


def test_the_histogram_is_of_powers_of_two():
    assert histogram(np.array([0, 1, 2, 3, 4, 7, 8, 8])) == ((0, 1, 1), (1, 2, 1), (2, 4, 2), (4, 8, 2), (8, 16, 2))
    assert histogram(np.array([5, 70])) == ((4, 8, 1), (8, 16, 0), (16, 32, 0), (32, 64, 0), (64, 128, 1))
    assert histogram(np.zeros(0, np.int64)) == ()


def test_tokens_before_the_first_bos_are_said(folder, tokenizer):
    one = open_shard(folder / "fineweb_train_000001.bin")
    found = inspect(ShardSet("x", (one,)), tokenizer)
    assert found.before_first == int(np.flatnonzero(one.tokens == tokenizer.bos)[0]) > 0
    found = inspect(ShardSet("x", (Shard(one.path, np.full(9, 5, np.uint16)),)), tokenizer)
    assert (found.before_first, found.documents, found.longest, found.lengths) == (9, 0, 0, ())


def test_without_a_tokenizer_bytes_and_samples_are_left_out(folder, fairway):
    (folder / "t.model").unlink()
    assert tokenizer_beside(folder) is None
    answer = fairway("data", "inspect", folder, "--json")
    found = json.loads(answer.out)
    assert found["tokenizer"] is None
    assert found["sets"][0]["documents"] == 20
    assert found["sets"][0]["bytes"] is found["sets"][0]["bytes_per_token"] is None
    assert "no tokenizer beside" in fairway("data", "inspect", folder).out


def test_the_command_line_shows_figures_samples_and_the_hash(folder, tokenizer, fairway):
    out = fairway("data", "inspect", folder).out
    for words in ("fineweb_train", "fineweb_val", tokenizer.sha256, "█", "A first document.\\n", "of them empty"):
        assert words in out
    found = json.loads(fairway("data", "inspect", folder / "fineweb_val_000000.bin", "--json").out)
    assert found["tokenizer"]["sha256"] == tokenizer.sha256
    assert [one["name"] for one in found["sets"]] == ["fineweb_val"]


def test_what_a_terminal_would_obey_is_escaped(folder, tokenizer, fairway):
    write_shard(folder / "fineweb_val_000000.bin", stream(tokenizer, [b"\x1b[2Jgone\r\x07"]))
    assert "\x1b" not in fairway("data", "inspect", folder).out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "too few for the header"),
        (lambda path: path.write_bytes(b"\0" * 2000), "begins with 0, not with 20240520"),
        (lambda path: write_shard(path, np.array([1, 7, 399, 400, 5], np.uint16)), "token 400 at position 3"),
        (lambda path: path.with_name("u.model").write_bytes(b"x"), "holds 2 tokenizers (t.model, u.model)"),
        (lambda path: path.with_name("t.model").write_bytes(b"x"), "no SentencePiece model"),
        (lambda path: (path.unlink(), path.mkdir()), "no .bin file"),
    ],
    ids=["cut", "header cut", "no shard", "foreign", "two tokenizers", "no tokenizer", "a folder"],
)
def test_bad_shards_are_one_line(folder, fairway, change, says):
    for path in folder.glob("fineweb_train_*.bin"):
        path.unlink()
    change(folder / "fineweb_val_000000.bin")
    for verb in ("inspect", "stats") if says != "token 400 at position 3" else ("inspect",):
        answer = fairway("data", verb, folder)
        assert answer.code in (1, 2)
        assert answer.err.count("\n") == 1
        assert says in answer.err


def test_a_place_that_is_not_there(tmp_path, fairway):
    answer = fairway("data", "inspect", tmp_path / "absent")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "No such file" in answer.err


def test_a_link_in_a_circle_and_a_folder_that_cannot_be_read(tmp_path, fairway, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    answer = fairway("data", "inspect", tmp_path / "loop")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "symbolic links" in answer.err

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    answer = fairway("data", "inspect", tmp_path)
    assert answer.err == f"DataError: {tmp_path}: Permission denied; name a folder that can be read\n"


def test_a_sidecar_of_other_shards_is_refused(folder, fairway):
    from fairway.data.building import sidecar

    path = sidecar.path_of(folder / "fineweb_val_000000.bin")
    rows = np.array([[0, 13, 13, 1], [3, 14, 14, 2]], dtype="<u8")
    path.write_bytes(sidecar.header(2, 4) + rows.tobytes())
    answer = fairway("data", "inspect", folder)
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "its documents do not begin where fineweb_val_000000.bin has BOS" in answer.err
    tokens = open_shard(folder / "fineweb_val_000000.bin").tokens
    rows[:, 0] = np.flatnonzero(tokens == 1)
    path.write_bytes(sidecar.header(2, 4) + rows.tobytes())
    found = json.loads(fairway("data", "inspect", folder / "fineweb_val_000000.bin", "--json").out)
    assert found["sets"][0]["original_bytes"] == 27


def test_which_shards_are_of_a_split():
    sets = [ShardSet(name, ()) for name in ("fineweb_train", "fineweb_val")]
    assert of_split(sets, "val", None).name == "fineweb_val"
    assert of_split(sets[:1], "val", None).name == "fineweb_train"  # the only one there is
    with pytest.raises(DataError, match=r"which of a, b is val\?"):
        of_split([ShardSet("a", ()), ShardSet("b", ())], "val", "x")


@pytest.fixture
def known(monkeypatch, tokenizer):
    """Facts of a small tokenizer, for windows of 4 tokens and shards of 17."""

    def set_to(**facts):
        monkeypatch.setattr(published, "WINDOW", 4)
        monkeypatch.setattr(published, "SHARD_TOKENS", 17)
        monkeypatch.setattr(published, "KNOWN", {tokenizer.sha256: Published("small", **facts)})

    return set_to


@pytest.fixture
def valid_facts(folder, tokenizer):
    """(documents, tokens, bytes) of the held-out shard, by hand."""
    tokens = stream(tokenizer, [b"held out text", b"and more of it"])
    return 2, len(tokens), 27


def checks(fairway, folder):
    answer = fairway("data", "stats", folder, "--json")
    return answer, {row["fact"]: row["verdict"] for row in json.loads(answer.out)["checks"]}


def test_a_set_as_published_passes_every_fact(folder, tokenizer, fairway, known, valid_facts, monkeypatch):
    documents, tokens, size = valid_facts
    (folder / "fineweb_train_000002.bin").unlink()
    write_shard(folder / "fineweb_train_000001.bin", np.array([1, 5, 6], np.uint16))
    monkeypatch.setattr("fairway.verbs.inspecting.KNOWN", {})
    scored = (tokens - 1) // 4 * 4
    sequence = stream(tokenizer, [b"held out text", b"and more of it"])
    per_token = count_bytes(sequence[: scored + 1], tokenizer) / scored
    known(documents=documents, scored_tokens=scored, bytes=size, bytes_per_token=f"{per_token:.3f}")
    answer, verdicts = checks(fairway, folder)
    assert answer.code == 0, answer.err
    assert set(verdicts.values()) == {"same"}
    assert len(verdicts) == 5
    table = fairway("data", "stats", folder).out
    assert table.count("same") == 5
    assert f"{scored:,}" in table


@pytest.mark.parametrize(
    ("facts", "fact"),
    [
        ({"documents": 3}, "held-out documents"),
        ({"scored_tokens": 4}, "scored tokens, a multiple of 4"),
        ({"bytes": 26}, "bytes"),
        ({"bytes_per_token": "9.99"}, "bytes per token"),
    ],
)
def test_each_fact_that_differs_is_named(folder, fairway, known, facts, fact):
    known(**({"documents": 2} | facts))
    answer, verdicts = checks(fairway, folder)
    assert verdicts[fact] == "DIFFERS"
    assert answer.code == 1
    assert answer.err.startswith("DataError: ")
    assert fact in answer.err


def test_a_training_shard_of_another_size_is_seen(folder, fairway, known):
    known(documents=2)
    _, verdicts = checks(fairway, folder)  # 17, 23 and the rest
    assert verdicts["training shards of 17 tokens"] == "DIFFERS"


def test_files_that_are_not_as_fetched_are_named(folder, tokenizer, fairway, known):
    known(documents=2)
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    rows = [{"name": "t.model", "bytes": len(tokenizer.model), "sha256": tokenizer.sha256}]
    (folder / "fetched.json").write_text(json.dumps({"files": rows}))
    assert fairway("data", "stats", folder).code == 0
    rows.append({"name": "fineweb_val_000000.bin", "bytes": 9, "sha256": "0" * 64})
    (folder / "fetched.json").write_text(json.dumps({"files": rows}))
    answer = fairway("data", "stats", folder)
    assert answer.code == 1
    assert "not as published: fineweb_val_000000.bin" in answer.err
    (folder / "fetched.json").write_text("[]")
    assert "no receipt of a fetch" in fairway("data", "stats", folder).err


def test_a_tokenizer_of_which_nothing_is_published(folder, fairway):
    answer = fairway("data", "stats", folder)
    assert answer.code == 2
    assert "nothing is published for the tokenizer" in answer.err
    assert "sp1024 (4f5e8adb109c" in answer.err


def test_the_hashes_of_the_published_tokenizers_are_right(data_folder):
    for name, facts in (("fineweb_1024_bpe", "sp1024"), ("fineweb_4096_bpe", "sp4096"), ("fineweb_8192_bpe", "sp8192")):
        tokenizer = Tokenizer((data_folder / "tokenizers" / f"{name}.model").read_bytes())
        assert published.KNOWN[tokenizer.sha256].name == facts


def test_stats_want_a_tokenizer(folder, fairway):
    (folder / "t.model").unlink()
    answer = fairway("data", "stats", folder)
    assert answer.code == 2
    assert "name it with --tokenizer" in answer.err


def test_overlap_of_shards_and_of_text_by_the_command_line(folder, tokenizer, fairway, tmp_path):
    write_shard(folder / "fineweb_val_000000.bin", stream(tokenizer, [TEXTS[2], b"quite other words"]))
    found = json.loads(fairway("data", "overlap", folder, folder, "--json", "--workers", "1").out)
    assert (found["exact"], found["held_out"], found["train_exact"]) == (1, 2, 5)
    assert found["exact_share"] == 0.5
    assert found["compared"] == "tokens"
    assert found["examples"][0]["text"] == TEXTS[2].decode()
    (tmp_path / "train.txt").write_text("@one two three@Four  five six seven eight nine")
    (tmp_path / "valid.jsonl").write_text('{"text": "@four five\\nsix seven eight nine"}\n{"text": "other"}\n')
    words = ("data", "overlap", tmp_path / "train.txt", tmp_path / "valid.jsonl", "--separator", "@")
    answer = fairway(*words, "--workers", "1")
    assert "50.0000% of the held-out documents" in answer.out
    assert "valid.jsonl: line 1 and train.txt: byte 14: the same" in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("FOLDER", "TEXT"), "token shards, beside text; give two of a kind"),
        (("TEXT", "TEXT", "--near", "0.1"), "--near 0.1: 0.3 to 1 is possible"),
        (("TEXT", "TEXT", "--format", "html"), "--format html: choices: auto, text, jsonl, parquet"),
        (("TEXT", "absent"), "absent: No such file"),
        (("EMPTY", "TEXT"), "no document in it"),
        (("TEXT", "EMPTY"), "no document in it"),
    ],
)
def test_wrong_words_to_overlap_are_one_line(folder, fairway, words, says):
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("some words")
    (folder / "text" / "empty.txt").write_text("")
    places = {"FOLDER": folder, "TEXT": folder / "text" / "a.txt", "EMPTY": folder / "text" / "empty.txt"}
    answer = fairway("data", "overlap", *(places.get(word, word) for word in words), "--workers", "1")
    assert answer.code in (1, 2)
    assert answer.err.count("\n") == 1
    assert says in answer.err
