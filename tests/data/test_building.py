"""Text becomes shards: each document once, in order, its bytes counted; the same whoever builds and whoever kills."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError, FairwayError, RecipeError
from fairway.base.specs import build as spec_of
from fairway.data import DataSpec, build_tokenizer, open_corpus, tokenize
from fairway.data.building import BuildSpec, build, join, read_manifest, reading, sidecar
from fairway.data.building import folder as folder_module
from fairway.data.building.listing import File, files_of
from fairway.data.building.reading import segments_of
from fairway.data.packed import _zstd
from fairway.data.sources.shards import open_shard
from fairway.data.sources.text import documents
from fairway.data.splits import key_of, share_of

HALF = {"valid_fraction": 0.5}


@pytest.fixture
def text(source_text) -> bytes:
    """About 60 KB in 60 documents that open with "def "; the first has no opening."""
    return source_text[:60_000]


@pytest.fixture
def made(tmp_path, tokenizer):
    """Builds a source given as bytes (one file) or as a list of places."""

    def make(source, name="out", processes=1, suffix=".txt", run=None, **values):
        if isinstance(source, bytes):
            place = tmp_path / f"source{suffix}"
            place.write_bytes(source)
            source = [str(place)]
        values = {"separator": "def ", "shard_tokens": 4000, **HALF, **values}
        return build(source, tmp_path / name, tokenizer, BuildSpec(**values), processes)

    make.folder, make.tokenizer = tmp_path, tokenizer
    return make


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of about 4 KB, so that a small text has many."""
    monkeypatch.setattr(reading, "BLOCK", 4096)


def read_back(folder: Path, split: str, tokenizer) -> list[bytes]:
    """The documents of a split by its tokens alone."""
    tokens = np.concatenate([np.zeros(0, np.uint16), *(open_shard(p).tokens for p in shards(folder, split))])
    starts = [*np.flatnonzero(tokens == tokenizer.bos), len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(starts)]


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"fineweb_{split}_*.bin"))


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, by its hash."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# What is built.


def test_every_document_is_there_once_in_order_and_on_the_side_its_hash_says(made, text, tokenizer):
    made(text)
    whole = documents(text, "def ")
    assert len(whole) > 40
    assert read_back(made.folder / "out", "train", tokenizer) == [d for d in whole if share_of(d) >= 0.5]
    assert read_back(made.folder / "out", "val", tokenizer) == [d for d in whole if share_of(d) < 0.5]


def test_shards_are_full_but_the_last_and_documents_go_on_in_the_next(made, text):
    manifest = made(text, valid_fraction=0.0, shard_tokens=1000)
    sizes = [len(open_shard(path).tokens) for path in shards(made.folder / "out", "train")]
    assert sizes[:-1] == [1000] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 1000
    assert sum(sizes) == manifest["splits"]["train"]["tokens"]
    assert [row["tokens"] for row in manifest["splits"]["train"]["shards"]] == sizes
    assert manifest["splits"]["val"]["shards"] == []


def test_the_sidecar_says_where_documents_begin_and_how_many_bytes_they_were(made, text, tokenizer):
    made(text, valid_fraction=0.0, shard_tokens=1000)
    whole, told = documents(text, "def "), []
    for path in shards(made.folder / "out", "train"):
        rows, tokens = sidecar.read(sidecar.path_of(path)), open_shard(path).tokens
        assert rows[:, sidecar.START].tolist() == np.flatnonzero(tokens == tokenizer.bos).tolist()
        told += rows[:, 1:].tolist()
    keys = [int.from_bytes(key_of(d)[:8], "big") for d in whole]
    assert told == [[len(d), len(d), key] for d, key in zip(whole, keys, strict=True)]


def test_the_manifest_tells_hashes_counts_and_settings(made, text, tokenizer):
    manifest = made(text, valid_documents=7)
    folder, whole = made.folder / "out", documents(text, "def ")
    assert manifest == read_manifest(folder) == json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert manifest["source"]["bytes"] == len(text)
    assert manifest["tokenizer"]["sha256"] == tokenizer.sha256
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert (val["documents"], val["bytes"]) == (7, sum(map(len, whole[:7])))
    assert val["documents"] + train["documents"] == len(whole)
    assert val["bytes"] + train["bytes"] == len(text)
    assert train["decoded_bytes"] == train["bytes"], "this tokenizer loses nothing"
    for row in (*val["shards"], *train["shards"]):
        path = folder / row["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        assert hashlib.sha256(sidecar.path_of(path).read_bytes()).hexdigest() == row["documents_sha256"]


def test_a_run_opens_what_was_built(made, text, tokenizer):
    made(text)
    out = made.folder / "out"
    told = {"vocab": 400, "model": tokenizer.name}  # found beside the data, where the build put it
    spec = spec_of(DataSpec, {"source": "shards", "path": str(out), "tokenizer": told})
    train, valid = open_corpus(spec, "train"), open_corpus(spec, "valid")
    opened = build_tokenizer(spec, train)
    assert tokenize(train, opened).text + tokenize(valid, opened).text
    assert tokenize(valid, opened).text == b"".join(d for d in documents(text, "def ") if share_of(d) < 0.5)


def test_the_first_documents_are_held_out_and_never_trained_on_under_another_number(made, tokenizer):
    source = b"".join(b"def %d " % (n % 10) for n in range(30))
    manifest = made(source, valid_documents=4)
    assert read_back(made.folder / "out", "val", tokenizer) == [b"def %d " % n for n in range(4)]
    assert read_back(made.folder / "out", "train", tokenizer) == [
        b"def %d " % (n % 10) for n in range(30) if n % 10 > 3
    ]
    assert manifest["counts"]["repeated"] == 8
    kept = made(source, name="kept", valid_documents=4, repeated="keep")
    assert kept["counts"]["repeated"] == 8
    assert kept["splits"]["train"]["documents"] == 26


# Where text comes from.


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2", ".zst", ""])
def test_packed_files_are_read_as_what_they_hold(made, text, tokenizer, suffix):
    pack = {
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda raw: _zstd().compress(raw),
        "": bytes,
    }
    manifest = made(pack[suffix](text), suffix=f".txt{suffix}", valid_fraction=0.0)
    assert b"".join(read_back(made.folder / "out", "train", tokenizer)) == text
    assert manifest["source"]["sha256"] == hashlib.sha256(text).hexdigest()


def test_a_folder_is_read_file_by_file_in_the_order_of_names(made, tokenizer):
    root = made.folder / "texts"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name, content in {"b/z.txt": b"three", "a.txt": b"one", "b/deep/y": b"two", ".hidden/x": b"not"}.items():
        (root / name).write_bytes(content)
    (root / "line\nend \udcff.txt").write_bytes(b"four, of an odd name")
    (root / "zero").write_bytes(b"")
    (root / "link").symlink_to(root / ".hidden" / "x")
    manifest = made([str(root)], separator="", valid_fraction=0.0)
    back = read_back(made.folder / "out", "train", tokenizer)
    assert back == [b"one", b"two", b"three", b"four, of an odd name", b"not"]
    assert manifest["counts"]["empty"] == 1
    assert manifest["source"]["files"] == 6


def test_json_lines_are_documents(made, tokenizer):
    texts = ["one\nwith a line end", "", "zwei ▁ 漢字", "three"]
    lines = [json.dumps({"id": n, "text": t}) for n, t in enumerate(texts)] + ['{"text": null}', "", "  "]
    manifest = made("\ufeff".encode() + "\r\n".join(lines).encode(), suffix=".jsonl", valid_fraction=0.0)
    assert read_back(made.folder / "out", "train", tokenizer) == [t.encode() for t in texts if t]
    assert manifest["counts"]["empty"] == 2
    assert manifest["counts"]["bytes"] == sum(len(t.encode()) for t in texts)


def test_parquet_rows_are_documents(made, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    place = made.folder / "rows.parquet"
    texts = [f"row {n}" for n in range(1000)] + [None, "", "last ▁"]
    parquet.write_table(pyarrow.table({"n": range(1003), "body": texts}), place, row_group_size=300)
    manifest = made([str(place)], text_key="body", valid_fraction=0.0)
    assert read_back(made.folder / "out", "train", tokenizer) == [t.encode() for t in texts if t]
    assert manifest["counts"]["empty"] == 2
    with pytest.raises(DataError, match=r"rows\.parquet: no column 'text'; set --text-key .*n, body"):
        made([str(place)], name="other")
    with pytest.raises(DataError, match=r"column 'n' holds int64, not text"):
        made([str(place)], name="other", text_key="n")
    place.write_bytes(place.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"rows\.parquet: no Parquet file, or a damaged one"):
        made([str(place)], name="other", text_key="body")


def test_standard_input_is_a_source(made, text, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    made(["-"], valid_fraction=0.0)
    assert b"".join(read_back(made.folder / "out", "train", tokenizer)) == text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"ab", b"b", b"\n", b"aa"]), max_size=60),
    st.sampled_from(["a", "aa", "aba", "ab", "\n", ""]),
    st.integers(1, 9),
)
def test_cutting_a_stream_into_segments_finds_the_documents_of_the_whole(tmp_path_factory, parts, separator, block):
    """Against the documents of the text in one piece, with blocks of a few bytes and marks that overlap themselves."""
    whole = b"".join(parts)
    place = tmp_path_factory.mktemp("cut") / "x"
    place.write_bytes(whole)
    before, reading.BLOCK = reading.BLOCK, block
    try:
        segments = list(segments_of([File(0, place, "x", "text", len(whole))], separator, "text", 1 << 20))
    finally:
        reading.BLOCK = before
    assert b"".join(s.content for s in segments) == whole
    assert [d for s in segments for d in documents(s.content, separator)] == documents(whole, separator)
    assert [s.place for s in segments] == [sum(len(t.content) for t in segments[:n]) for n in range(len(segments))]


# The same whoever builds.


def test_one_process_or_three_make_the_same_bytes(made, text):
    made(text, "one", 1, valid_documents=9)
    made(text, "three", 3, valid_documents=9)
    assert contents(made.folder / "one") == contents(made.folder / "three")


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("files", [1, 7])
def test_parts_join_to_what_one_host_would_have_made(made, text, parts, files, monkeypatch):
    """One file is divided by blocks, seven by files; documents that stand twice are found across parts."""
    root = made.folder / "texts"
    root.mkdir()
    text = text + text[2000:9000]
    step = -(-len(text) // files)
    for n in range(files):
        (root / f"{n}.txt").write_bytes(text[n * step : (n + 1) * step])
    values = {"valid_documents": 9, "shard_tokens": 1500}
    made([str(root)], "whole", **values)
    for part in range(1, parts + 1):
        made([str(root)], f"part{part}", part=part, parts=parts, **values)
        assert not shards(made.folder / f"part{part}", "train"), "no part can be mistaken for the whole"
    folders = [made.folder / f"part{part}" for part in range(1, parts + 1)]
    join(list(reversed(folders)), made.folder / "joined")
    assert contents(made.folder / "joined") == contents(made.folder / "whole")
    assert read_manifest(made.folder / "joined")["counts"]["repeated"] > 0
    documents_of_parts = [read_manifest(folder)["counts"]["documents"] for folder in folders]
    assert min(documents_of_parts) > 0
    assert sum(documents_of_parts) == read_manifest(made.folder / "whole")["counts"]["documents"]


def test_parts_that_do_not_belong_together_are_refused(made, text):
    for part in (1, 2):
        made(text, f"part{part}", part=part, parts=2)
    one, two = made.folder / "part1", made.folder / "part2"
    with pytest.raises(RecipeError, match="part 2 of 2: missing"):
        join([one], made.folder / "joined")
    with pytest.raises(RecipeError, match=r"part1: part 1 again"):
        join([one, one], made.folder / "joined")
    made(text, "other", part=2, parts=2, separator="class ")
    with pytest.raises(RecipeError, match=r"other: separator = 'class ', but 'def '"):
        join([one, made.folder / "other"], made.folder / "joined")
    made(text.replace(b"def", b"DEF", 1), "changed", part=2, parts=2)
    with pytest.raises(RecipeError, match=r"changed: another source"):
        join([one, made.folder / "changed"], made.folder / "joined")
    made(text, "whole")
    with pytest.raises(RecipeError, match="no part of a build, but a whole one"):
        join([made.folder / "whole"], made.folder / "joined")
    next(two.glob("*.documents")).write_bytes(b"short")
    with pytest.raises(DataError, match=r"part2/.*\.documents: no whole header"):
        join([one, two], made.folder / "joined")


# Killed and called again.


class Killed(BaseException):
    """Stands for a kill: nothing catches it, and no clearing up may be counted on."""


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_a_build_cut_off_anywhere_goes_on_to_the_same_bytes(made, text, monkeypatch, at, seconds):
    """After any block: with a checkpoint at each, and with those that full shards cause alone."""
    made(text, "whole", valid_documents=9, shard_tokens=1700)
    monkeypatch.setattr(folder_module, "SECONDS", seconds)
    add, checkpoint, count = folder_module.Folder.add, folder_module.Folder.checkpoint, [0]

    def cut_off(self, encoded):
        count[0] += 1
        if count[0] > at:
            monkeypatch.setattr(folder_module.Folder, "checkpoint", lambda self: None)
            raise Killed
        add(self, encoded)

    monkeypatch.setattr(folder_module.Folder, "add", cut_off)
    with pytest.raises(Killed):
        made(text, "cut", valid_documents=9, shard_tokens=1700)
    monkeypatch.setattr(folder_module.Folder, "add", add)
    monkeypatch.setattr(folder_module.Folder, "checkpoint", checkpoint)
    whole = shards(made.folder / "cut", "*")
    for path in whole:
        assert len(open_shard(path).tokens) == 1700, "whatever has a final name is whole"
    before = {path.name: path.stat().st_mtime_ns for path in whole}
    made(text, "cut", valid_documents=9, shard_tokens=1700)
    assert contents(made.folder / "cut") == contents(made.folder / "whole")
    assert all((made.folder / "cut" / name).stat().st_mtime_ns == when for name, when in before.items()), "made again"


def test_a_build_killed_between_a_checkpoint_and_the_names_it_gives_goes_on(made, text, monkeypatch):
    made(text, "whole")
    give = folder_module.give_names
    monkeypatch.setattr(folder_module, "give_names", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        made(text, "cut")
    assert not shards(made.folder / "cut", "*")
    monkeypatch.setattr(folder_module, "give_names", give)
    made(text, "cut")
    assert contents(made.folder / "cut") == contents(made.folder / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_at_random_moments_leave_the_same_bytes(made, text, monkeypatch):
    """SIGKILL to the parent alone: its workers must end by themselves, and the next call finds nothing half-written."""
    monkeypatch.setattr(folder_module, "SECONDS", 0.02)
    source = made.folder / "long.txt"
    source.write_bytes(b"".join(text.replace(b"def ", b"def %d " % n) for n in range(6)))

    def begin(out: str) -> tuple[int, int]:
        """(the process that builds, what can be read to its end when it and all its workers are gone)."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                made([str(source)], out, 2, valid_documents=50, shard_tokens=20_000)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        return child, reader

    def end(child: int, reader: int) -> int:
        assert os.read(reader, 1) == b""
        os.close(reader)
        return os.waitpid(child, 0)[1]

    started = time.monotonic()
    assert end(*begin("whole")) == 0
    lasted, draw, kills = time.monotonic() - started, random.Random(6), 0
    for _ in range(10):
        child, reader = begin("killed")
        time.sleep(draw.uniform(0.0, lasted / 4))
        os.kill(child, signal.SIGKILL)
        kills += end(child, reader) == signal.SIGKILL
        for path in shards(made.folder / "killed", "*"):
            open_shard(path)
            sidecar.read(sidecar.path_of(path))
    assert end(*begin("killed")) == 0
    assert kills >= 3, "most kills must meet a build at work"
    assert contents(made.folder / "killed") == contents(made.folder / "whole")


def test_another_source_or_setting_is_refused_when_a_build_goes_on(made, text, monkeypatch):
    monkeypatch.setattr(folder_module, "SECONDS", 0.0)
    broken = text + b"\xff"
    with pytest.raises(DataError, match="no UTF-8"):
        made(broken)
    with pytest.raises(RecipeError, match=r"out: was begun with separator = 'def ', not 'class '"):
        made(broken, separator="class ")
    with pytest.raises(RecipeError, match=r"out: was begun with listing_sha256"):
        made(text)
    with pytest.raises(DataError, match=r"out: the source has changed since"):
        made(b"x" + broken[1:])
    assert made(broken, invalid="replace")["counts"]["invalid"] == 1, "a milder rule changes nothing that was done"
    with pytest.raises(RecipeError, match=r"out: was built with shard_tokens = 4000"):
        made(broken, shard_tokens=5000, invalid="replace")


def test_a_source_that_became_shorter_is_refused(made, text, monkeypatch):
    monkeypatch.setattr(folder_module, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text + b"\xff")))
    with pytest.raises(DataError, match="no UTF-8"):
        made(["-"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text[:5000])))
    with pytest.raises(DataError, match=r"out: the source has changed"):
        made(["-"])


def test_what_is_built_already_is_not_built_again(made, text, monkeypatch):
    first = made(text)
    monkeypatch.setattr("fairway.data.building.making.encode_block", lambda *_: pytest.fail("encoded again"))
    assert made(text) == first


def test_a_folder_of_other_shards_is_left_alone(made, text):
    (made.folder / "out").mkdir()
    (made.folder / "out" / "fineweb_train_000000.bin").write_bytes(b"not mine")
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin: a shard of another making"):
        made(text)


def test_two_builds_in_one_folder_are_refused(made, text):
    from fairway.base.folders import locked

    with locked(made.folder / "out"), pytest.raises(RecipeError, match="another process builds here"):
        made(text)


@pytest.mark.parametrize("damage", [b"{", b"{}", b'{"settings": 3}'])
def test_a_damaged_checkpoint_is_named(made, text, damage):
    (made.folder / "out").mkdir()
    (made.folder / "out" / ".building.json").write_bytes(damage)
    with pytest.raises((DataError, RecipeError), match=r"\.building\.json: damaged|was begun with"):
        made(text)


# What a tokenizer loses, and what is no text.


@pytest.fixture
def challenge(shared_data):
    from fairway.data import Tokenizer

    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    return Tokenizer(model.read_bytes(), str(model))


def test_a_loss_is_refused_or_counted_and_its_first_place_told(made, challenge):
    place = made.folder / "lines.txt"
    place.write_bytes("def one line;def two\nlines;def ﬁne".encode())
    spec = {"separator": "def ", "valid_fraction": 0.0}
    with pytest.raises(DataError, match=r"lossy on lines\.txt, byte 13, byte 7 of it: b'\\nlines;' .*--lossy report"):
        build([str(place)], made.folder / "out", challenge, BuildSpec(**spec), 1)
    manifest = build([str(place)], made.folder / "out", challenge, BuildSpec(**spec, lossy="report"), 1)
    assert manifest["counts"]["lost"] == 2
    assert manifest["first_loss"]["place"] == "lines.txt, byte 13"
    assert manifest["splits"]["train"]["bytes"] == len(place.read_bytes()), "of the original, whatever was lost"
    assert manifest["splits"]["train"]["decoded_bytes"] == len(b"def one line;def two lines;def fine")
    rows = sidecar.read(made.folder / "out" / "fineweb_train_000000.documents")
    assert rows[:, sidecar.BYTES].tolist() == [13, 14, 9]
    assert rows[:, sidecar.DECODED].tolist() == [13, 14, 9 - len("ﬁ".encode()) + len(b"fi")]


def test_bytes_that_are_no_utf8_are_refused_or_replaced_and_counted(made, tokenizer):
    source = "def fine \ufffd;def b".encode() + b"\xe2\x96 ad \xff;def good"
    with pytest.raises(
        DataError, match=r"source\.txt: byte 13: no UTF-8 at byte 5 of the document .*--invalid replace"
    ):
        made(source)
    manifest = made(source, invalid="replace", valid_fraction=0.0)
    assert read_back(made.folder / "out", "train", tokenizer)[1] == "def b\ufffd ad \ufffd;".encode()
    assert (manifest["counts"]["invalid"], manifest["counts"]["replaced"]) == (1, 2)
    rows = sidecar.read(made.folder / "out" / "fineweb_train_000000.documents")
    assert rows[1, sidecar.BYTES] == len(b"def b\xe2\x96 ad \xff;"), "bytes of the original are what a score divides by"
    assert rows[1, sidecar.DECODED] == rows[1, sidecar.BYTES] + 3


def test_halves_of_characters_in_json_are_no_utf8(made, tokenizer):
    lines = rb'{"text": "a\ud800b"}' + b"\n" + b'{"text": "raw \xff"}'
    with pytest.raises(DataError, match=r"source\.jsonl: line 1: no UTF-8"):
        made(lines, suffix=".jsonl")
    manifest = made(lines, suffix=".jsonl", invalid="replace", valid_fraction=0.0)
    assert manifest["counts"]["invalid"] == 2
    assert read_back(made.folder / "out", "train", tokenizer)[1] == "raw \ufffd".encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 3: no JSON"),
        (b"[" * 100_000, "line 3: no JSON"),
        (b'{"body": "x"}', "line 3: no key 'text', only body; set --text-key"),
        (b"[1]", "line 3: no key 'text', only list"),
        (b'{"text": 7}', "line 3: 'text' holds no text but 7"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 3: no JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(made, line, says):
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            made(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}', suffix=".jsonl", processes=processes)
        assert f"source.jsonl: {says}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_document_that_is_too_long_is_refused_before_it_is_held(made):
    for source, suffix, where in (
        (b"def short" + b"def " + b"x" * 99_000, ".txt", "byte 9"),
        (b"x" * 99_000, ".txt", "byte 0"),
        (b'{"text": "a"}\n{"text": "' + b"x" * 99_000, ".jsonl", "line 2"),
        (b"def tiny def " + b"y" * 1100, ".txt", "byte 9"),
    ):
        with pytest.raises(DataError, match=rf"source\{suffix}: the document at {where} is longer than 1,000 bytes"):
            made(source, suffix=suffix, longest=1000)
        shutil.rmtree(made.folder / "out", ignore_errors=True)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2", ".zst"])
def test_a_packed_file_that_is_damaged_or_cut_short_is_named(made, text, suffix):
    pack = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda raw: _zstd().compress(raw)}
    whole = pack[suffix](text)
    for damaged in (whole[: len(whole) // 2], b"not packed at all", whole[:40] + bytes(40) + whole[80:]):
        with pytest.raises(DataError, match=rf"source\.txt\{suffix}: damaged or cut short") as caught:
            made(damaged, suffix=f".txt{suffix}")
        assert "\n" not in str(caught.value)
        shutil.rmtree(made.folder / "out", ignore_errors=True)


def test_places_that_cannot_be_read_are_named(made, tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    with pytest.raises(DataError, match=r"texts: no file in it"):
        made([str(root)])
    with pytest.raises(DataError, match=r"absent: No such file"):
        made([str(tmp_path / "absent")])
    (root / "loop").symlink_to(root)
    with pytest.raises(DataError, match=r"loop: a link back to a folder that it lies in"):
        made([str(root)])
    (root / "loop").unlink()
    (root / "self").symlink_to(root / "self")
    with pytest.raises(DataError, match=r"self \(a link that leads nowhere, or in a circle\)"):
        made([str(root)])
    (root / "self").unlink()
    os.mkfifo(root / "pipe\nwith a line end")
    with pytest.raises(DataError, match=r"pipe\\nwith a line end: neither a file nor a folder") as caught:
        made([str(root)])
    assert "\n" not in str(caught.value)


def test_a_folder_without_permission_is_named(made, tmp_path, monkeypatch):
    root = tmp_path / "texts"
    root.mkdir()
    listing, opened = os.listdir, Path.open

    def forbidden(path):
        if Path(path) == root:
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(DataError, match=r"texts: Permission denied; name what can be read"):
        made([str(root)])
    monkeypatch.setattr(os, "listdir", listing)
    (root / "secret").write_bytes(b"x")

    def closed(path, *rest, **more):
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **more)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(DataError, match=r"secret: Permission denied"):
        made([str(root)])


def test_files_that_are_no_source_are_refused(made, text, tmp_path):
    made(text)
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin: a shard of tokens, not text"):
        made([str(tmp_path / "out" / "fineweb_train_000000.bin")], name="again")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x").write_bytes(b"text")
    with pytest.raises(RecipeError, match=r"in: holds x of the source"):
        made([str(tmp_path / "in")], name="in")
    with pytest.raises(RecipeError, match=r"x: is .*x again; name each file once"):
        made([str(tmp_path / "in"), str(tmp_path / "in" / "x")], name="twice")
    (tmp_path / "in" / "x").write_bytes(b"")
    with pytest.raises(DataError, match=r"in: no document in it"):
        made([str(tmp_path / "in")], name="nothing")


def test_a_full_disk_is_one_line_and_the_build_goes_on_when_there_is_space(made, text, monkeypatch):
    made(text, "whole")
    append = folder_module.Shards._append

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(self, tokens, rows):
        if self.number == 2:
            files = self._files()
            self._open = (Full(files[0]), files[1])
        append(self, tokens, rows)

    monkeypatch.setattr(folder_module.Shards, "_append", full)
    with pytest.raises(FairwayError, match=r"out: could not be written: No space left on device; free some space"):
        made(text)
    monkeypatch.setattr(folder_module.Shards, "_append", append)
    made(text)
    assert contents(made.folder / "out") == contents(made.folder / "whole")


def test_a_process_that_dies_is_one_line(made, text, monkeypatch):
    monkeypatch.setattr("fairway.data.building.making.encode_block", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(FairwayError, match=r"worker process \d+: ended by signal 9, .*fewer --workers"):
        made(text, processes=2)


def test_the_error_is_that_of_the_first_document_whatever_the_processes(made, text):
    source = text[:9000] + b"\xfe" + text[9000:30_000] + b"\xff" + text[30_000:]
    said = set()
    for processes in (1, 2, 4):
        with pytest.raises(DataError) as caught:
            made(source, f"out{processes}", processes)
        said.add(str(caught.value))
    assert len(said) == 1
    assert "\\xfe" in said.pop()


@pytest.mark.parametrize(
    "values",
    [
        {"valid_documents": -1},
        {"valid_fraction": 1.5},
        {"shard_tokens": 0},
        {"shard_tokens": 2**31},
        {"part": 3, "parts": 2},
        {"part": 0, "parts": 0},
        {"longest": 0},
        {"kind": "pdf"},
        {"invalid": "keep"},
        {"lossy": "hide"},
        {"repeated": "drop"},
    ],
)
def test_impossible_builds_are_refused(values):
    with pytest.raises(RecipeError, match="--"):
        BuildSpec(**values)


def test_the_order_of_files_is_that_of_names_not_of_the_file_system(tmp_path, monkeypatch):
    for name in ("b", "a", "B", "é", "a.txt"):
        (tmp_path / name).write_bytes(name.encode())
    listed = [file.name for file in files_of([str(tmp_path)])]
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listing(path), reverse=True))
    assert [file.name for file in files_of([str(tmp_path)])] == listed == ["B", "a", "a.txt", "b", "é"]


def test_standard_input_tells_how_much_came_since_nobody_knows_its_end(made, text, monkeypatch, capsys):
    from fairway.base.journal import Run

    seconds = iter(range(0, 10_000, 7))
    monkeypatch.setattr("fairway.data.building.making.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    build(["-"], made.folder / "out", made.tokenizer, BuildSpec(separator="def "), 1, Run(quiet=False))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("build ") and " documents, " in line and line.endswith(" s") for line in lines)


def test_a_longer_limit_or_a_milder_rule_lets_a_build_go_on(made, text, monkeypatch):
    monkeypatch.setattr(folder_module, "SECONDS", 0.0)
    source = text + b"def " + b"x" * 20_000
    with pytest.raises(DataError, match="longer than 12,000 bytes"):
        made(source, longest=12_000)
    assert (made.folder / "out" / ".building.json").exists()
    made(source, longest=30_000)
    made(source, "whole", longest=30_000)
    assert contents(made.folder / "out") == contents(made.folder / "whole")
