"""The same bytes whoever builds: many processes, parts on several hosts, a build killed and called again."""

import io
import os
import random
import signal
import sys
import time

import pytest

from fairway.base.errors import DataError, RecipeError
from fairway.data.building import folder as folder_module
from fairway.data.building import join, read_manifest, sidecar
from fairway.data.sources.shards import open_shard
from tests.data.built import contents, shards


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


def test_a_longer_limit_or_a_milder_rule_lets_a_build_go_on(made, text, monkeypatch):
    monkeypatch.setattr(folder_module, "SECONDS", 0.0)
    source = text + b"def " + b"x" * 20_000
    with pytest.raises(DataError, match="longer than 12,000 bytes"):
        made(source, longest=12_000)
    assert (made.folder / "out" / ".building.json").exists()
    made(source, longest=30_000)
    made(source, "whole", longest=30_000)
    assert contents(made.folder / "out") == contents(made.folder / "whole")
