"""The embedded corpus: read from whatever standard library there is, never imported, the same each time."""

import sys
import sysconfig
from pathlib import Path

import pytest

from fairway.base.errors import DataError
from fairway.data import DataSpec, open_corpus
from fairway.data.sources import python_docs
from fairway.data.splits import key_of

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def documents() -> list[bytes]:
    parts = python_docs.load(python_docs.Spec(), "")
    return [*parts.train, *parts.valid]


@pytest.fixture
def small_library(monkeypatch, documents):
    """Reading the standard library takes seconds: here it has twenty documents."""
    calls = []
    monkeypatch.setattr(python_docs, "extract", lambda root: calls.append(root) or documents[:20])
    return calls


def test_it_is_of_the_promised_size(documents):
    assert 1_700_000 < sum(map(len, documents)) < 2_600_000
    assert 400 < len(documents) < 800
    assert len(set(documents)) == len(documents)


def test_it_holds_the_reference_and_docstrings(documents):
    import json

    assert any(document.startswith(b'The "assert" statement') for document in documents)
    assert any((json.__doc__ or "").strip().encode() in document for document in documents)


def test_whole_documents_are_held_out_by_hash(documents):
    parts = python_docs.divide(documents, 96_000)
    assert 95_000 <= sum(map(len, parts.valid)) <= 96_000
    assert set(parts.train) | set(parts.valid) == set(documents)
    assert not set(parts.train) & set(parts.valid)
    again = python_docs.divide(documents[::-1], 96_000)
    assert (again.train, again.valid) == (parts.train, parts.valid)
    assert list(parts.train) == sorted(parts.train, key=key_of)


def test_the_cache_gives_the_same_text_and_is_verified(small_library, own_cache):
    first = open_corpus(DataSpec(), "valid")
    (stored,) = own_cache.iterdir()
    assert sys.version.split()[0] in stored.name
    assert open_corpus(DataSpec(), "valid").sha256 == first.sha256
    assert len(small_library) == 1
    content = bytearray(stored.read_bytes())
    content[-100] ^= 1
    stored.write_bytes(content)
    assert open_corpus(DataSpec(), "valid").sha256 == first.sha256
    assert len(small_library) == 2


def test_nothing_is_imported(tmp_path, monkeypatch):
    """`this` prints a poem when it is imported, `antigravity` opens a browser."""
    monkeypatch.setattr(python_docs, "LEAST", 10)
    for name in ("this.py", "antigravity.py", "_pydecimal.py"):
        (tmp_path / name).write_bytes((STDLIB / name).read_bytes())
    before = set(sys.modules)
    assert python_docs.extract(tmp_path)
    assert set(sys.modules) == before


def _library(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_other_layouts_do_not_stop_it(tmp_path, monkeypatch):
    monkeypatch.setattr(python_docs, "LEAST", 10)
    long = "word " * 40
    _library(
        tmp_path,
        good=f'"""{long}first."""\ndef f():\n    """{long}second."""\n',
        broken="def (:\n",
        test__inner=f'"""{long}of a test."""',
        newer=f'"""{long}third."""\ntype X[T = int] = list[T]\n',
        same=f'"""{long}first."""\n',
        pydoc_data__topics=f"topics: dict = {{'b': '{long}bee', 'a': '\\n{long}ay\\n', 'n': None}}",
    )
    (tmp_path / "nul.py").write_bytes(b"x = '\x00'")
    (tmp_path / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""' + long.encode() + b'\xe9"""')
    found = python_docs.extract(tmp_path)
    assert [document.split()[-1] for document in found if document.split()[-1] != b"third."] == [
        b"ay",
        b"bee",
        b"second.",
        "word é".encode().split()[-1],
    ]


def test_an_installation_without_source_files_is_told_what_to_do(tmp_path):
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(DataError, match=r"data\.source = text"):
            python_docs.extract(root)


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, small_library):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_corpus(DataSpec(), "valid").bytes > 1000
    assert len(small_library) == 1
