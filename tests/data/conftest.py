"""Text to learn a small tokenizer from, a cache apart from the user's, and the measured data where present."""

import inspect
import os
from pathlib import Path

import pytest

from fairway.data import Tokenizer, TokenizerSpec
from fairway.data.building import BuildSpec, build, reading
from fairway.data.learning import train


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache_apart(session_cache, monkeypatch):
    """One cache for all tests here, so that the standard library is read once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_cache))


@pytest.fixture
def own_cache(_cache_apart, tmp_path, monkeypatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "own" / "fairway"


@pytest.fixture(scope="session")
def source_text() -> bytes:
    """Real text of about 120 KB that every installation has, with indentation and line ends."""
    return inspect.getsource(inspect).encode()


@pytest.fixture(scope="session")
def tokenizer(source_text) -> Tokenizer:
    return Tokenizer(train([source_text], TokenizerSpec(vocab=400)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("FAIRWAY_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder} (set FAIRWAY_DATA)")
    return folder


@pytest.fixture
def text(source_text) -> bytes:
    """About 60 KB in some 60 documents that open with "def "; the first has no opening."""
    return source_text[:60_000]


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Blocks of about 4 KB, so that a small text has many."""
    monkeypatch.setattr(reading, "BLOCK", 4096)


@pytest.fixture
def made(tmp_path, tokenizer, small_blocks):
    """Builds a source given as bytes (one file) or as a list of places, half of it held out."""

    def make(source, name="out", processes=1, suffix=".txt", **values):
        if isinstance(source, bytes):
            place = tmp_path / f"source{suffix}"
            place.write_bytes(source)
            source = [str(place)]
        values = {"separator": "def ", "shard_tokens": 4000, "valid_fraction": 0.5, **values}
        return build(source, tmp_path / name, tokenizer, BuildSpec(**values), processes)

    make.folder, make.tokenizer = tmp_path, tokenizer
    return make
