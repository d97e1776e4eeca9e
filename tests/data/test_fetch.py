"""Fetching: what is under its own name is whole and as published; whatever went wrong, a second call finishes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fairway.base.errors import BudgetError, DataError, FairwayError, RecipeError
from fairway.base.folders import locked
from fairway.base.journal import Run
from fairway.data.fetching import Hub, Layout, Mirror, Patience, Published, fetch
from fairway.data.fetching.download import PARTS
from fairway.data.shardsets import RECEIPT
from fairway.data.sources.shards import write_shard
from tests.data.hub_server import COMMIT, Server

OURS = Layout(repository="owner/data")
QUICK = Patience(tries=4, first=0.01, longest=0.05, most_asked=2.0)
TRAIN = "datasets/datasets/fineweb10B_sp400/fineweb_train_{:06d}.bin"
VALID = "datasets/datasets/fineweb10B_sp400/fineweb_val_000000.bin"
MODEL = "datasets/tokenizers/fineweb_400_bpe.model"


def shard(count, seed, folder):
    tokens = np.random.default_rng(seed).integers(3, 400, count).astype(np.uint16)
    write_shard(folder / "made.bin", tokens)
    return (folder / "made.bin").read_bytes()


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    files = {TRAIN.format(i): shard(3000 + i, i, folder) for i in range(3)}
    files |= {VALID: shard(900, 9, folder), MODEL: tokenizer.model, "README.md": b"# About\n"}
    return files | {"datasets/datasets/fineweb10B_sp999/fineweb_val_000000.bin": shard(5, 1, folder)}


@pytest.fixture
def server(published):
    made = Server(published)
    yield made
    made.close()


def take(server, folder, shards=2, **values):
    return fetch(Hub(OURS, server.endpoint), OURS, "sp400", shards, folder, patience=QUICK, **values)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != PARTS)


WHOLE = ["fetched.json", "fineweb_400_bpe.model", "fineweb_train_000000.bin", "fineweb_train_000001.bin"]
WHOLE += ["fineweb_val_000000.bin"]


def nothing_half(folder, published):
    """Whatever stands under its own name is what was published."""
    contents = {path.rpartition("/")[2]: content for path, content in published.items() if "sp999" not in path}
    for path in folder.iterdir() if folder.exists() else ():
        if path.name in contents:
            assert path.read_bytes() == contents[path.name], path.name


def test_the_first_shards_the_held_out_ones_and_the_tokenizer_come_whole(server, published, tmp_path):
    found = take(server, tmp_path / "f")
    assert names(tmp_path / "f") == WHOLE
    nothing_half(tmp_path / "f", published)
    assert not (tmp_path / "f" / PARTS).exists()
    assert (found.files, found.train_shards, found.valid_shards) == (4, 2, 1)
    sizes = [len(published[name]) for name in (TRAIN.format(0), TRAIN.format(1), VALID, MODEL)]
    assert found.bytes == found.new_bytes == sum(sizes)


def test_the_receipt_names_commit_and_content(server, published, tmp_path):
    take(server, tmp_path)
    receipt = json.loads((tmp_path / RECEIPT).read_text())
    assert receipt["source"] == {
        "repository": "owner/data", "kind": "dataset", "revision": "main", "commit": COMMIT
    }  # fmt: skip
    for row in receipt["files"]:
        assert row["sha256"] == hashlib.sha256(published[row["path"]]).hexdigest()
        assert row["bytes"] == len(published[row["path"]])


def test_a_second_call_fetches_nothing_and_more_shards_only_the_new_ones(server, tmp_path):
    take(server, tmp_path)
    served = server.served
    assert take(server, tmp_path).new_bytes == 0
    assert not [path for path, _ in server.requests[-4:] if "resolve" in path]
    assert take(server, tmp_path, shards=3).new_bytes == len(server.files[TRAIN.format(2)])
    assert served < server.served


def test_a_file_that_was_changed_here_is_fetched_anew(server, published, tmp_path):
    take(server, tmp_path)
    path = tmp_path / "fineweb_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert take(server, tmp_path).new_bytes == len(content)
    nothing_half(tmp_path, published)


@pytest.mark.parametrize(
    "fault", ["drop:0", "drop:2000", "429:0", "429:1", "503", "500", "408", "corrupt", "whole"], ids=str
)
@pytest.mark.parametrize("name", [TRAIN.format(1), MODEL], ids=["large", "small"])
def test_a_trouble_that_passes_is_waited_out(server, published, tmp_path, fault, name):
    server.faults[name] = [fault]
    found = take(server, tmp_path)
    assert names(tmp_path) == WHOLE
    nothing_half(tmp_path, published)
    assert found.new_bytes == found.bytes


def test_after_a_drop_the_rest_alone_is_asked_for(server, published, tmp_path):
    name = TRAIN.format(0)
    server.faults[name] = ["drop:1000", "drop:1500"]
    take(server, tmp_path)
    assert [asked for path, asked in server.requests if path == f"/cdn/{name}"] == [
        None, "bytes=1000-", "bytes=2500-"
    ]  # fmt: skip
    nothing_half(tmp_path, published)


def test_a_server_that_begins_anew_is_understood(server, published, tmp_path):
    server.faults[TRAIN.format(0)] = ["drop:1000", "whole"]
    take(server, tmp_path)
    nothing_half(tmp_path, published)


def test_retry_after_is_obeyed(server, tmp_path):
    server.faults[VALID] = ["429:1"]
    started = time.monotonic()
    take(server, tmp_path)
    assert time.monotonic() - started >= 1.0


def test_without_a_word_about_it_the_endpoint_is_the_hubs_own(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Hub(Layout()).endpoint.startswith("https://")


@pytest.mark.parametrize("what", ["info", "tree"])
def test_the_listing_too_is_asked_for_again(server, tmp_path, what):
    server.faults[what] = ["429:0", "503"]
    take(server, tmp_path)
    assert names(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (["drop:0"] * 9, r"given up after 4 tries: .*call again, it goes on from here"),
        (["429"] * 9, r"given up after 4 tries: .*status 429"),
        (["429:3600"], r"it asks for 3,600 s of rest"),
        (["404"], r"not found \(404\)"),
        (["403"], r"access refused \(403\).*HF_TOKEN"),
        (["418"], r"status 418"),
        (["short:50"], r"the server sends 50 bytes, its listing says [\d,]+"),
        (["long"], r"more than the [\d,]+ bytes of the listing come"),
        (["corrupt"] * 2, r"twice damaged on its way: its sha256 is [0-9a-f]{16}…, published is [0-9a-f]{16}…"),
    ],
    ids=["drops", "busy", "very busy", "gone", "private", "odd", "short", "long", "damaged"],
)
def test_a_trouble_that_stays_is_one_line_and_a_second_call_finishes(server, published, tmp_path, faults, says):
    name = TRAIN.format(1)
    server.faults[name] = list(faults)
    with pytest.raises(DataError, match=says) as caught:
        take(server, tmp_path, jobs=1)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / "fineweb_train_000001.bin").exists()
    assert not (tmp_path / RECEIPT).exists()
    nothing_half(tmp_path, published)
    server.faults.clear()
    take(server, tmp_path)
    assert names(tmp_path) == WHOLE
    nothing_half(tmp_path, published)


def test_a_listing_with_a_wrong_hash_never_names_a_file(server, tmp_path):
    server.listed[VALID] = (len(server.files[VALID]), "ab" * 32)
    with pytest.raises(DataError, match="published is abababababababab…"):
        take(server, tmp_path)
    assert not (tmp_path / "fineweb_val_000000.bin").exists()


def test_a_listing_with_a_wrong_size_never_names_a_file(server, tmp_path):
    content = server.files[VALID]
    server.listed[VALID] = (len(content) + 7, hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match=rf"sends {len(content):,} bytes, its listing says {len(content) + 7:,}"):
        take(server, tmp_path)
    assert not (tmp_path / "fineweb_val_000000.bin").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"<html>no shard</html>" * 99, "begins with"), (b"tiny", "too few"), ("cut", "bytes for its 900 tokens")],
)
def test_what_is_published_as_a_shard_and_is_none_is_refused(server, tmp_path, content, why):
    server.files[VALID] = server.files[VALID][:-2] if content == "cut" else content
    with pytest.raises(DataError, match=rf"fineweb_val_000000\.bin: came as published, but .*{why}") as caught:
        take(server, tmp_path)
    assert PARTS not in str(caught.value)
    assert not (tmp_path / "fineweb_val_000000.bin").exists()


def test_what_is_published_as_a_tokenizer_and_is_none_is_refused(server, tmp_path):
    server.files[MODEL] = b"no model"
    with pytest.raises(DataError, match=r"fineweb_400_bpe\.model: came as published, but no SentencePiece model"):
        take(server, tmp_path)


@pytest.mark.parametrize(
    ("name", "shards", "kind", "says"),
    [
        ("sp400", 4, DataError, r"owner/data: 3 training shards for sp400, not 4; use --shards 3"),
        ("sp512", 1, DataError, r"owner/data: no file named \*\*/fineweb_512_bpe\.model among 7"),
        ("byte", 1, RecipeError, r"--tokenizer byte: ends in no number"),
        ("../x1", 1, RecipeError, r"--tokenizer '\.\./x1'"),
    ],
)
def test_what_the_repository_does_not_hold_is_said(server, tmp_path, name, shards, kind, says):
    with pytest.raises(kind, match=says):
        fetch(Hub(OURS, server.endpoint), OURS, name, shards, tmp_path, patience=QUICK)
    assert names(tmp_path) == []


def test_a_repository_that_is_not_there(server, tmp_path):
    layout = Layout(repository="owner/else")
    with pytest.raises(DataError, match=r"owner/else: not found \(404\)"):
        fetch(Hub(layout, server.endpoint), layout, "sp400", 1, tmp_path, patience=QUICK)


@pytest.mark.parametrize("what", ["info", "tree"])
def test_a_page_for_people_in_place_of_an_answer(server, tmp_path, what):
    """As a network gives that wants a login first."""
    server.faults[what] = ["html"]
    with pytest.raises(DataError, match=r"owner/data: http://127.* answers as no hub does \(JSONDecodeError") as caught:
        take(server, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"given up after 4 tries: ConnectError .*HF_ENDPOINT.*--from"):
        fetch(Hub(OURS, "http://127.0.0.1:9"), OURS, "sp400", 1, tmp_path, patience=QUICK)


def test_offline_mode_is_heeded(server, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE: is set"):
        take(server, tmp_path)


def test_a_disk_that_is_too_small_is_known_before_a_byte_comes(server, tmp_path, monkeypatch):
    free = type("usage", (), {"free": 64_000_100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(BudgetError, match=r"GB are to come, 0\.06 GB are free"):
        take(server, tmp_path)
    assert server.served < 20_000  # the listing
    assert names(tmp_path) == []


def test_a_full_disk_in_the_middle_is_one_line(server, published, tmp_path, monkeypatch):
    real = Path.open

    def full(path, *words, **values):
        file = real(path, *words, **values)
        if "ab" in words and "val" in path.name:
            file.close()
            file = real(Path("/dev/full"), "ab", buffering=0)
        return file

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(FairwayError, match=r"No space left on device; free some space"):
            take(server, tmp_path)
    nothing_half(tmp_path, published)
    take(server, tmp_path)
    assert names(tmp_path) == WHOLE


def test_two_fetches_do_not_share_a_folder(server, tmp_path):
    with locked(tmp_path / PARTS), pytest.raises(RecipeError, match="another fetch is at work in it"):
        take(server, tmp_path)
    take(server, tmp_path)
    assert names(tmp_path) == WHOLE


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"file: is a file; name a folder with -o"):
        take(server, tmp_path / "file")
    with pytest.raises(RecipeError, match=r"name a folder that can be written"):
        take(server, tmp_path / "file" / "below")


def test_several_files_at_a_time(server, tmp_path):
    """Two files are under way at once: the second is asked for before the first is served."""
    server.pause = 0.02
    take(server, tmp_path, shards=3, jobs=4)
    asked = [path for path, _ in server.requests if path.startswith("/datasets/")]
    assert len(asked) == 5
    first_content = next(i for i, (path, _) in enumerate(server.requests) if path.startswith("/cdn/"))
    assert len([1 for path, _ in server.requests[: first_content + 3] if "resolve" in path]) >= 2


@pytest.mark.parametrize("laid_out", [True, False], ids=["like the repository", "as a fetch leaves it"])
def test_a_local_folder_does_as_well(server, published, tmp_path, laid_out):
    place, layout = tmp_path / "mirror", OURS
    if laid_out:
        for name, content in published.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    else:
        take(server, place)
        layout = Layout(train="fineweb_train_*.bin", valid="fineweb_val_*.bin", model="*.model")
    asked = len(server.requests)
    found = fetch(Mirror(place, RECEIPT), layout, "sp400", 2, tmp_path / "f", patience=QUICK)
    assert names(tmp_path / "f") == WHOLE
    assert found.source == {"folder": str(place)}
    nothing_half(tmp_path / "f", published)
    assert len(server.requests) == asked


def test_a_mirror_that_was_damaged_after_its_fetch_is_refused(server, tmp_path):
    take(server, tmp_path / "m")
    path = tmp_path / "m" / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    layout = Layout(train="fineweb_train_*.bin", valid="fineweb_val_*.bin", model="*.model")
    with pytest.raises(DataError, match="twice damaged"):
        fetch(Mirror(tmp_path / "m", RECEIPT), layout, "sp400", 2, tmp_path / "f", patience=QUICK)


def test_the_same_name_in_two_folders_asks_for_a_choice():
    listing = [Published(f"{folder}/fineweb_400_bpe.model", 1) for folder in "ab"]
    with pytest.raises(DataError, match=r"is found in a, b; set model in a layout file"):
        Layout().choose(listing, "sp400", 0)


class Watched(Run):
    """A run that keeps what its meters were told."""

    def __init__(self):
        super().__init__()
        self.told = []

    @contextmanager
    def meter(self, label, total, unit, begun=0.0):
        yield SimpleNamespace(update=lambda done: self.told.append((label, begun, done, total)))


def test_progress_counts_what_is_there_and_never_more_than_the_whole(server, tmp_path):
    server.faults[TRAIN.format(0)] = ["drop:1000", "404"]
    with pytest.raises(DataError):
        take(server, tmp_path, jobs=1)
    run = Watched()
    take(server, tmp_path, run=run)
    label, begun, done, total = run.told[-1]
    assert (label, done) == ("fetch", total)
    assert begun >= 1000
    assert all(begun <= done <= total for label, begun, done, total in run.told if label == "fetch")
    run = Watched()
    take(server, tmp_path, run=run)
    assert {label for label, *_ in run.told} == {"check"}


def test_patience_doubles_and_ends():
    patience = Patience(first=1, longest=10)
    assert [patience.wait(n, None) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 8, 10]
    assert patience.wait(1, 30.0) == 30.0


def command(folder, *words):
    return [sys.executable, "-m", "fairway", "data", "fetch", "fineweb", "--repository", "owner/data",
            "--tokenizer", "sp400", "--shards", "2", "-o", str(folder), *words]  # fmt: skip


def test_killed_in_the_middle_it_leaves_nothing_half_written_and_goes_on(
    server, published, tmp_path, fairway, monkeypatch
):
    server.pause = 0.3
    environment = os.environ | {"HF_ENDPOINT": server.endpoint, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "f"), env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "f" / PARTS
    while process.poll() is None and sum(p.stat().st_size for p in parts.glob("*.bin.*")) < 4096:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "f" / RECEIPT).exists()
    nothing_half(tmp_path / "f", published)
    left = {path.name: path.stat().st_size for path in parts.glob("*.bin.*")}
    assert any(size > 0 for size in left.values())
    server.pause = 0.0
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    answer = fairway(*command(tmp_path / "f", "--json")[3:])
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["new_bytes"] < found["bytes"]
    assert names(tmp_path / "f") == WHOLE
    nothing_half(tmp_path / "f", published)
    assert [asked for path, asked in server.requests if asked and path.startswith("/cdn/")]


def test_the_command_line_says_what_came_and_what_is_next(server, tmp_path, fairway, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    answer = fairway(*command(tmp_path / "f")[3:])
    assert answer.code == 0, answer.err
    assert "2 training and 1 held-out shard(s) and their tokenizer" in answer.out
    assert "fairway data stats" in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("else", "--tokenizer", "sp400", "--shards", "1"), "else: no such data set; choices: fineweb"),
        (("no.toml", "--tokenizer", "sp400", "--shards", "1"), "no.toml: No such file"),
        (("bad.toml", "--tokenizer", "sp400", "--shards", "1"), "bad.toml: "),
        (("odd.toml", "--tokenizer", "sp400", "--shards", "1"), "repositori: unknown key (did you mean 'repository'?)"),
        (("fineweb", "--tokenizer", "sp400", "--shards", "1", "--from", "x", "--revision", "y"), "--from: a local"),
    ],
)
def test_wrong_words_are_one_line(tmp_path, fairway, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("= 1")
    (tmp_path / "odd.toml").write_text('repositori = "x/y"')
    answer = fairway("data", "fetch", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert says in answer.err


def test_a_layout_of_ones_own(server, published, tmp_path, fairway, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.chdir(tmp_path)
    lines = ['repository = "owner/data"', f'train = "{TRAIN.format(0)}"', f'valid = "{VALID}"', f'model = "{MODEL}"']
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    answer = fairway("data", "fetch", "mine.toml", "--tokenizer", "any", "--shards", "1", "--json")
    assert answer.code == 0, answer.err
    assert names(tmp_path / "data" / "mine_any") == [name for name in WHOLE if "train_000001" not in name]


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RecipeError, match=r"pip install 'fairway\[hub\]'"):
        Hub(OURS)
