"""Text that every Python installation carries: the language reference and the standard library's docstrings.

About 2.1 MB in about 570 documents, with no network. A topic of the reference (`pydoc_data.topics`) is a document; all
docstrings of one module, in the order of its source, are one. The source files are parsed, never imported, and packages
that not every installation has (idlelib, turtledemo, test folders, ...) are left out. The text changes with the Python
version, so its sha256 is a fact of every run. Measured: 3.11.7 2,118,668 bytes in 569 documents; 3.12.1 2,067,149 in
528; 3.13.0 2,032,771 in 489 (distutils and lib2to3 went).
"""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairway.base.errors import DataError
from fairway.data import cache
from fairway.data.splits import Parts, key_of

FORMAT = 1  # of the extraction: raised when the text of the same installation would come out differently
SHORTEST = 100  # bytes; shorter documents are one-line descriptions ("Implementation module")
LEAST = 500_000  # bytes of text below which this is no whole standard library
_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
_PACKAGED_APART = {"idlelib", "turtledemo", "ensurepip", "msilib"}  # on some systems
_LEFT_OUT = _NOT_DOCUMENTATION | _PACKAGED_APART


@dataclass(frozen=True)
class Spec:
    """The embedded default corpus."""

    held_out_bytes: int = 96_000  # about as many, in whole documents

    def __post_init__(self) -> None:
        if self.held_out_bytes < 1_000:
            raise ValueError(f"held_out_bytes = {self.held_out_bytes}: at least 1,000 is needed")


def load(spec: Spec, path: str) -> Parts:
    """The documents in the order of their hashes, so that the held-out ones and dev are fair samples. `path`: the
    folder of a standard library, or "" for this Python's own."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    version = f"{platform.python_implementation()}-{platform.python_version()}".lower()
    name = f"python_docs-{FORMAT}-{version}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    documents = _unpack(cache.load(name))
    if documents is None:
        documents = extract(root)
        cache.store(name, _pack(documents))
    return divide(documents, spec.held_out_bytes)


def divide(documents: list[bytes], held_out_bytes: int) -> Parts:
    """Goes through the documents in the order of their hashes and holds out those that still fit."""
    valid, train, held = list[bytes](), list[bytes](), 0
    for document in sorted(set(documents), key=key_of):
        if held < 0.99 * held_out_bytes and held + len(document) <= held_out_bytes:
            valid.append(document)
            held += len(document)
        else:
            train.append(document)
    return Parts(train=tuple(train), valid=tuple(valid))


def extract(root: Path) -> list[bytes]:
    """The documents of the standard library at `root`, duplicates dropped, in the order of names."""
    if not root.is_dir():
        raise DataError(f"{root}: no standard library in a folder (a packed Python?); use data.source = text")
    found = dict.fromkeys(text.encode("utf-8", "replace") for text in (*topics(root), *docstrings(root)))
    documents = [document for document in found if len(document) >= SHORTEST]
    total = sum(map(len, documents))
    if total < LEAST:
        raise DataError(f"{root}: {total:,} bytes of documentation, under {LEAST:,}; use data.source = text")
    return documents


def topics(root: Path) -> Iterator[str]:
    """The topics of the language reference, by name."""
    tree = _parse(root / "pydoc_data" / "topics.py")
    for node in tree.body if tree else ():
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Dict):
            pairs = zip(value.keys, value.values, strict=True)
            table = {k.value: v.value for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)}
            yield from (text.strip("\n") + "\n" for _, text in sorted(table.items()) if isinstance(text, str))


def docstrings(root: Path) -> Iterator[str]:
    """One text for each module that has docstrings; a docstring seen before is left out."""
    seen: set[str] = set()
    for path in _modules(root):
        if tree := _parse(path):
            fresh = [text for text in _of_module(tree) if text not in seen]
            seen.update(fresh)
            if fresh:
                yield "\n\n".join(dict.fromkeys(fresh)) + "\n"


def _modules(root: Path) -> list[Path]:
    """The source files, by name in an order that no file system decides."""
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _LEFT_OUT]  # site-packages may hold a thousand folders
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _of_module(tree: ast.Module) -> list[str]:
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inside = sorted((n for n in ast.walk(tree) if isinstance(n, documented)), key=lambda n: (n.lineno, n.col_offset))
    return [text.strip("\n") for node in (tree, *inside) if (text := ast.get_docstring(node)) and text.strip()]


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None: an unreadable or deliberately broken file has no documentation to give."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning, DeprecationWarning: old escapes in old modules
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _pack(documents: list[bytes]) -> bytes:
    return json.dumps([len(document) for document in documents]).encode() + b"\n" + b"".join(documents)


def _unpack(content: bytes | None) -> list[bytes] | None:
    if content is None:
        return None
    head, _, body = content.partition(b"\n")
    documents, position = [], 0
    for length in json.loads(head):
        documents.append(body[position : position + length])
        position += length
    return documents
