"""Text becomes shards: each document once, in order, on its side, its bytes counted, whatever it was packed in."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.base.errors import DataError
from fairway.base.specs import build as spec_of
from fairway.data import DataSpec, build_tokenizer, open_corpus, tokenize
from fairway.data.building import BuildSpec, build, read_manifest, reading, sidecar
from fairway.data.building.listing import File, files_of
from fairway.data.building.reading import segments_of
from fairway.data.packed import _zstd
from fairway.data.sources.shards import open_shard
from fairway.data.sources.text import documents
from fairway.data.splits import key_of, share_of
from tests.data.built import read_back, shards


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
