"""What a tokenizer loses and what is no text: told in one line, nothing half-written, nothing hidden."""

import bz2
import gzip
import lzma
import os
import shutil
import signal
from pathlib import Path

import pytest

from fairway.base.errors import DataError, FairwayError, RecipeError
from fairway.data.building import BuildSpec, build, sidecar
from fairway.data.building import folder as folder_module
from fairway.data.packed import _zstd
from tests.data.built import contents, read_back


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
