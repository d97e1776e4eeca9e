"""Compressing as a person and a pipe meet it: files, standard input and output, JSON, one-line mistakes, and nothing
half-written under the output's name, whatever happens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairway.artifact import PackSpec, open_artifact, seal
from tests.tiny.way import SAMPLE

TEXT = SAMPLE.read_bytes()[:1500] + b"\r\n\x00\xff\xfe no final newline"


@pytest.fixture(scope="module")
def artifact(tiny_run):
    return tiny_run / "artifact.fw"


@pytest.fixture
def here(tmp_path):
    """A folder with a text in it."""
    (tmp_path / "text").write_bytes(TEXT)
    return tmp_path


@pytest.fixture
def packed(fairway, here, artifact):
    """The compressed text."""
    answer = fairway("compress", here / "text", "-a", artifact, "-o", here / "text.fwc")
    assert answer.code == 0, answer.err
    return here / "text.fwc"


def refused(answer, family, *says):
    """One line on standard error that begins with the family and says so; its exit code; nothing else."""
    assert answer.err.startswith(f"{family}: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert answer.code == (2 if family == "RecipeError" else 1)
    assert answer.out == ""
    for words in says:
        assert words in answer.err, answer.err
    return True


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def shell(command, *arguments, stdin=b"", cwd=None):
    line = [sys.executable, "-m", "fairway", command, *map(str, arguments)]
    return subprocess.run(line, input=stdin, capture_output=True, timeout=120, cwd=cwd, env=quiet())


def quiet():
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def alive(group):
    """The processes of a group that still run (Linux; elsewhere none is found); not the dead that nobody waited for."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
            found += [status.parent.name] if its_group == str(group) and state != "Z" else []
    return found


# What works


def test_a_file_comes_back_and_both_verbs_say_what_they_did(fairway, here, artifact):
    answer = fairway("compress", here / "text", "-a", artifact, "-o", here / "text.fwc")
    size = (here / "text.fwc").stat().st_size
    assert answer.code == 0
    assert f"{len(TEXT):,} bytes -> {size:,}" in answer.out
    assert f"{8 * size / len(TEXT):.4f} bits per byte" in answer.out
    answer = fairway("decompress", here / "text.fwc", "-a", artifact, "-o", here / "back")
    assert answer.code == 0
    assert f"{size:,} bytes -> {len(TEXT):,}" in answer.out
    assert (here / "back").read_bytes() == TEXT
    assert names(here) == ["back", "text", "text.fwc"]


def test_json_counts_every_byte_of_the_file(fairway, here, artifact):
    found = json.loads(fairway("compress", here / "text", "-a", artifact, "-o", here / "c", "--json").out)
    assert found["file_bytes"] == (here / "c").stat().st_size == found["word_bytes"] + found["framing_bytes"]
    assert found["text_bytes"] == len(TEXT)
    assert found["updates"] == 0
    assert abs(8 * found["word_bytes"] / found["ideal_bits"] - 1) < 0.02
    assert "content" not in found
    found = json.loads(fairway("decompress", here / "c", "-a", artifact, "-o", here / "d", "--json").out)
    assert (found["file_bytes"], found["text_bytes"]) == ((here / "c").stat().st_size, len(TEXT))


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff"], ids=["empty", "a newline", "a byte of no text"])
def test_the_shortest_files_come_back(fairway, here, artifact, text):
    (here / "short").write_bytes(text)
    for adapt in ([], ["--adapt"]):
        answer = fairway("compress", here / "short", "-a", artifact, "-o", here / "c", *adapt, "--json")
        assert answer.code == 0, answer.err
        assert fairway("decompress", here / "c", "-a", artifact, "-o", here / "back").code == 0
        assert (here / "back").read_bytes() == text


def test_with_adapt_it_learns_as_it_goes(fairway, here, artifact):
    answer = fairway("compress", here / "text", "-a", artifact, "-o", here / "c", "--adapt", "--json")
    assert json.loads(answer.out)["updates"] >= 2
    assert fairway("decompress", here / "c", "-a", artifact, "-o", here / "back").code == 0
    assert (here / "back").read_bytes() == TEXT


def test_standard_input_and_output_work_in_pipes(here, artifact):
    """Two processes, nothing but bytes between them, nothing on standard error."""
    written = shell("compress", "-", "-a", artifact, "-o", "-", stdin=TEXT, cwd=here)
    assert (written.returncode, written.stderr) == (0, b"")
    assert written.stdout.startswith(b"FWCODED\x01")
    read = shell("decompress", "-", "-a", artifact, "-o", "-", stdin=written.stdout, cwd=here)
    assert (read.returncode, read.stderr) == (0, b"")
    assert read.stdout == TEXT
    assert names(here) == ["text"]


def test_an_output_s_folder_is_made(fairway, here, packed, artifact):
    answer = fairway("decompress", packed, "-a", artifact, "-o", here / "new" / "folder" / "back")
    assert answer.code == 0
    assert (here / "new" / "folder" / "back").read_bytes() == TEXT


# What is refused


def test_adapting_with_an_artifact_that_does_not_adapt(fairway, here, artifact):
    own = open_artifact(artifact)
    seal(here / "still.fw", own.tensors, own.model_spec, own.vocab, own.tokenizer, {"score": {}}, PackSpec())
    answer = fairway("compress", here / "text", "-a", here / "still.fw", "-o", here / "out", "--adapt")
    assert refused(answer, "RecipeError", "still.fw: names no adaptation; leave --adapt out")
    assert not (here / "out").exists()


def test_files_that_are_not_there(fairway, here, packed, artifact):
    for verb in ("compress", "decompress"):
        answer = fairway(verb, here / "absent", "-a", artifact, "-o", here / "out")
        assert refused(answer, "DataError", f"{here / 'absent'}: No such file")
        answer = fairway(verb, here, "-a", artifact, "-o", here / "out")
        assert refused(answer, "DataError", "directory")
        answer = fairway(verb, packed, "-a", here / "absent.fw", "-o", here / "out")
        assert refused(answer, "ArtifactError", f"{here / 'absent.fw'}: No such file")
    assert names(here) == ["text", "text.fwc"]


def test_json_and_the_file_cannot_share_standard_output(fairway, here, packed, artifact):
    for verb in ("compress", "decompress"):
        answer = fairway(verb, packed, "-a", artifact, "-o", "-", "--json")
        assert refused(answer, "RecipeError", f"fairway {verb}", "name a file with -o")


def test_an_output_that_cannot_be_written(fairway, here, packed, artifact):
    for out in (here / "text" / "out", here):  # below a file; a folder
        for verb in ("compress", "decompress"):
            answer = fairway(verb, packed, "-a", artifact, "-o", out)
            assert answer.code == 1
            assert answer.err.rstrip("\n").splitlines()[-1].startswith(f"FairwayError: {out}: could not be written")
            assert "Traceback" not in answer.err
    assert names(here) == ["text", "text.fwc"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: b"PK" + content, "magic"),
        (lambda content: content[:5], "magic"),
        (lambda content: content[:10], "header: cut short"),
        (lambda content: content[:-1], "segment 0: its words are cut short"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "segment 0: its words are damaged"),
        (lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:], "header: damaged"),
        (lambda content: content[:7] + b"\x07" + content[8:], "version: 7"),
        (lambda content: content + b"\n", "end: 1 bytes follow"),
    ],
    ids=["another magic", "5 bytes", "10 bytes", "cut short", "words", "header", "version", "a byte too many"],
)
def test_a_damaged_file_is_refused_and_what_stood_there_stays(fairway, here, packed, artifact, damage, says):
    packed.write_bytes(damage(packed.read_bytes()))
    (here / "kept").write_bytes(b"what stood there")
    for out in ("kept", "new"):
        answer = fairway("decompress", packed, "-a", artifact, "-o", here / out)
        assert refused(answer, "ArtifactError", f"{packed}: ", says)
    assert (here / "kept").read_bytes() == b"what stood there"
    assert names(here) == ["kept", "text", "text.fwc"]


def test_another_artifact_is_refused(fairway, here, packed, artifact):
    own = open_artifact(artifact)
    seal(here / "other.fw", own.tensors, own.model_spec, own.vocab, own.tokenizer, {"score": {}}, PackSpec())
    answer = fairway("decompress", packed, "-a", here / "other.fw", "-o", here / "out")
    assert refused(answer, "ArtifactError", own.sha256[:12], "name the one that wrote it")
    assert not (here / "out").exists()


def test_standard_input_is_named_where_it_is_damaged(here, artifact):
    done = shell("decompress", "-", "-a", artifact, "-o", "-", stdin=b"no such thing", cwd=here)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"ArtifactError: standard input: magic: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_leaves_nothing_under_the_output_s_name(here, artifact, sent):
    """While two processes compress 4 MB of text. A terminal sends Ctrl-C to all of them, `kill` its signal to the first
    alone."""
    (here / "long").write_bytes(SAMPLE.read_bytes() * 340)
    (here / "out").write_bytes(b"what stood there")
    line = [sys.executable, "-m", "fairway", "compress", "long", "-a", str(artifact), "-o", "out"]
    done = subprocess.Popen(
        line,
        cwd=here,
        stderr=subprocess.PIPE,
        env=quiet(),
        start_new_session=True,
        # Where the tests run in a shell's background SIGINT is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.stderr is not None
    assert done.stderr.readline().startswith(b"compress"), "its first line of progress: the processes are at work"
    (os.killpg if sent == signal.SIGINT else os.kill)(done.pid, sent)
    _, said = done.communicate(timeout=60)
    assert done.returncode == 130
    assert b"Traceback" not in said, said.decode()
    assert names(here) == ["long", "out", "text"]
    assert (here / "out").read_bytes() == b"what stood there"
    deadline = time.monotonic() + 10
    while alive(done.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(done.pid), "a process of it goes on"
