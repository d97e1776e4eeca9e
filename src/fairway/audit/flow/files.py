"""What lies in files: data sets told by their names, and what the script itself wrote."""

from __future__ import annotations

import ast
import fnmatch
import posixpath
import re

from fairway.audit.beside import table_at, text_at
from fairway.audit.flow import events
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.names import names_a_split, sides_of
from fairway.audit.flow.operations import Operations
from fairway.audit.flow.tokens import UNNAMED, UNTOLD, Tok, part_of
from fairway.audit.flow.values import (
    CLAIMED,
    LENGTH,
    MISSING,
    NO_TOKENS,
    NONE,
    NOTHING,
    RAW,
    TEXT,
    Value,
    blend,
    join,
)
from fairway.audit.settings import UNKNOWN
from fairway.audit.verdict import Place

_MODEL = re.compile(
    r"model|weights|artifact|checkpoint|ckpt|\.(?:ptz?|pth|bin|xz|lzma|zst|br|zlib|safetensors)$", re.IGNORECASE
)
"""Paths of files that a model is read from: a table of losses lies in others."""


def _fits(name: str, pattern: str) -> bool:
    """Whether a file that the script wrote is among those that it looks for: `rank~0~.npz`, whose pieces are known one
    by one, among `rank*.npz`."""
    return not pattern or fnmatch.fnmatchcase(name.replace("~", ""), pattern.replace("~", "*"))


class Files(Operations):
    """Reading, writing and saying."""

    def _list_of(self, elem: Value, node: ast.AST | None) -> Value:
        listed = self.new("list", None, node)
        listed.slots["#elem"] = elem
        return self.ref(listed)

    def path_of(self, value: Value) -> Value:
        """The path that a file, a Path or a text stands for."""
        found: Value | None = None
        for obj in sorted(value.refs, key=lambda each: each.number):
            held = obj.slots.get("#path")
            if isinstance(held, Value):
                found = held if found is None else join(found, _as_words(held))
        if found is not None:
            return found
        return value if value.const is not MISSING else self.flat(value)

    def path(self, args: list[Value], node: ast.AST | None) -> Value:
        """Path(a, b): one path of its pieces."""
        path = self.new("thing", "path", node)
        pieces = [self.path_of(each) for each in args]
        if args and all(isinstance(each.const, str) for each in pieces):
            env = blend(*map(self.flat, args)).env
            path.slots["#path"] = Value(const="/".join(str(each.const) for each in pieces), env=env)
        else:
            path.slots["#path"] = blend(*map(_as_words, pieces)) if pieces else NOTHING
        return self.ref(path)

    def piece_of_path(self, value: Value, name: str) -> Value:
        """`path.parent`, `.name`, ...; of a path that is not known to the letter, all that is known of it."""
        path = self.path_of(value)
        if isinstance(path.const, str) and name in _PIECES:
            return Value(const=_PIECES[name](path.const), env=path.env)
        return self.flat(_as_words(path))

    def pieces_of_path(self, value: Value) -> Value | None:
        """`path.parts`, folder by folder; None where the path is not known to the letter."""
        path = self.path_of(value)
        if not isinstance(path.const, str):
            return None
        return Value(items=tuple(Value(const=piece, env=path.env) for piece in path.const.split("/")))

    def read_from(self, path: Value, node: ast.AST | None, live: bool = False) -> Value:
        """What lies in a file: what the script wrote there, or a data set."""
        text = self.text_of(path)
        written = self.files.slots.get(text)
        if isinstance(written, Value):
            return written
        kinds = data_kinds(path)
        if kinds[0].startswith(UNNAMED):
            others = [
                value for name, value in self.files.slots.items() if isinstance(value, Value) and _fits(name, text)
            ]
            if others and (not text or "*" in text):
                found = others[0]
                for each in others[1:]:
                    found = join(found, each)
                return found
        spans = path.spans if not live else self.here()
        part = part_of(path.limit) if path.limit is not None and kinds == ("val",) else ""
        origin = self.read_here(kinds, "" if sides_of(_texts(path)) else _fits_both(path))
        if kinds[0].startswith(UNNAMED) and not isinstance(path.const, str):
            kinds = (f"{UNTOLD}{origin}",)
        toks = frozenset(Tok(each, spans, part=part, origin=origin) for each in kinds)
        return Value(toks=toks, flags=RAW, env=path.env)

    def read_here(self, kinds: tuple[str, ...], pattern: str) -> int:
        """The number of this read among the places of the script that read data. kinds, pattern: see Read."""
        stack = tuple(Place(each.script.path, each.script.line(each.line)) for each in self.frames)
        read, reads = events.Read(stack, len(kinds) > 1, pattern, len(self.trace.events), kinds), self.trace.reads
        if read not in reads:
            reads.append(read)
        return reads.index(read)

    def keep_in(self, path: Value, arrays: Value) -> None:
        """The script writes arrays to a file, by their names, to read them again: the losses of one rank."""
        self.heap.set(self.files, self.text_of(path), arrays)

    def write_to(self, path: Value, value: Value, node: ast.AST | None) -> None:
        """The script writes a file."""
        flat, text = self.flat(value), self.text_of(path)
        model = bool(flat.states) and bool(flat.knows) and bool(_MODEL.search(text))
        told = bool(flat.losses) and not model  # beside weights lies a number that was fitted by losses
        if told:
            self.said(flat, path, node, "written")
        if told or isinstance(value.const, str) or (flat.flags & TEXT and not flat.states and not flat.knows):
            return  # a log, a table of results: not what a model is read from
        if flat.states and flat.toks and not flat.raw and not value.refs:
            value = self._stored(flat, node)
        if flat.states or flat.knows:
            self.trace.saved.append(len(self.trace.events))
        old = self.files.slots.get(text)
        self.heap.set(self.files, text, join(old, value) if isinstance(old, Value) and self.nest else value)

    def move(self, here: Value, there: Value) -> None:
        """os.replace(here, there): what was written to the one is read from the other."""
        held, text = self.files.slots.get(self.text_of(here)), self.text_of(there)
        if isinstance(held, Value) and text:
            self.heap.set(self.files, text, held)

    def _stored(self, weights: Value, node: ast.AST | None) -> Value:
        """Weights that were computed from activations, as bytes: what reads them knows of it, where no model is made of
        them that says so itself. They hold no tokens, and what lies beside them, a prior, is none that was read."""
        bit = self.learn(self.new("tensor", None, node), weights.toks, "computed", node)
        self.computed |= bit
        return weights.but(knows=weights.knows | bit, toks=NO_TOKENS, losses=0)

    def said(self, value: Value, where: Value, node: ast.AST | None, how: str) -> None:
        """A number is reported."""
        texts = [*value.words, *where.words, *([where.const] if isinstance(where.const, str) else [])]
        event = self.note(events.Said, node, value=value, text=" ".join(texts)[:400], how=how)
        self.trace.said.append(event)

    def opened(self, path: Value, mode: Value, node: ast.AST | None) -> Obj:
        """A file; a log where something is added to it, a counter where it is read and written through one handle:
        data and weights are not."""
        file = self.new("thing", "file", node)
        file.slots["#path"] = path
        if isinstance(mode.const, str) and "a" in mode.const:
            file.slots["#grows"] = 1
        if isinstance(mode.const, str) and "+" in mode.const:
            file.slots["#shared"] = 1
        return file

    def claimed(self) -> Value:
        """A number out of a counter that several processes share."""
        return Value(spans=self.here(), flags=CLAIMED)

    def file_method(self, obj: Obj, name: str, args: list[Value], node: ast.AST | None) -> Value | None:
        path = obj.slots["#path"]
        if "#shared" in obj.slots and name in ("read", "readline", "write"):
            return self.claimed() if name != "write" else NOTHING
        if name in ("write", "writelines", "write_bytes", "write_text") and args:
            told = self.flat(args[0])
            if "#grows" in obj.slots and told.flags & TEXT and not told.losses:
                return NONE  # lines that are added to a log
            self.write_to(path, told if name != "write_bytes" else args[0], node)
            return NOTHING
        if name == "readinto" and args:
            found = self.read_from(path, node, live=True)
            for cell in args[0].refs:
                if cell.kind == "tensor":
                    self.write(cell, found, node, strong=True)
            return Value(flags=LENGTH)
        unwritten = name in ("read", "read_text") and self.text_of(path) not in self.files.slots
        if unwritten and table_at(self.settings.tables, path.const) is not UNKNOWN:
            return Value(const=text_at(self.settings.tables, path.const))
        if name in ("read", "readline", "read_text", "read_bytes", "readlines", "getvalue", "getbuffer"):
            return self.read_from(path, node, live=True)
        if name in ("exists", "is_file", "is_dir"):
            return NOTHING
        if name in ("stat", "tell", "fileno", "seek"):
            return Value(flags=LENGTH)
        if name in ("glob", "rglob", "iterdir"):
            inner = self.new("thing", "path", node)
            inner.slots["#path"] = self.flat(blend(_as_words(path), *map(_as_words, args)))
            return self._list_of(self.ref(inner), node)
        if name == "open":
            return self.ref(self.opened(path, args[0] if args else NOTHING, node))
        if name in ("resolve", "absolute", "expanduser", "as_posix", "__enter__"):
            return self.ref(obj)
        if name in ("with_suffix", "joinpath", "with_name"):
            inner = self.new("thing", "path", node)
            made = _renamed(path, name, args)
            inner.slots["#path"] = blend(_as_words(path), *map(_as_words, args)) if made is None else made
            return self.ref(inner)
        if name in ("rename", "replace") and len(args) == 1:
            self.move(path, args[0])
            return args[0]
        if name in ("flush", "close", "mkdir", "unlink", "__exit__", "touch"):
            return NONE
        return None


def _renamed(path: Value, name: str, args: list[Value]) -> Value | None:
    """`path.with_name(name)`, `.with_suffix(suffix)`, `.joinpath(a, b)`, where all of it is known to the letter."""
    texts = [each.const for each in args]
    if not isinstance(path.const, str) or not texts or not all(isinstance(each, str) for each in texts):
        return None
    if name == "with_suffix":
        made = f"{posixpath.splitext(path.const)[0]}{texts[0]}"
    else:
        folder = posixpath.dirname(path.const) if name == "with_name" else path.const
        made = posixpath.join(folder, *map(str, texts))
    return Value(const=made, env=path.env.union(*(each.env for each in args)))


_PIECES = {
    "dirname": posixpath.dirname,
    "parent": posixpath.dirname,
    "basename": posixpath.basename,
    "name": posixpath.basename,
    "stem": lambda path: posixpath.splitext(posixpath.basename(path))[0],
    "suffix": lambda path: posixpath.splitext(path)[1],
}


def _as_words(value: Value) -> Value:
    return Value(words=(value.const,)) if isinstance(value.const, str) else value


def data_kinds(path: Value) -> tuple[str, ...]:
    """The data sets that a path names: by the last literal text that says training or validation."""
    texts = _texts(path)
    found = sides_of(texts)
    if found:
        return tuple(found)
    text = "~".join(texts)
    return ("train", "val") if _fits_both(path) else (f"{UNNAMED}{text[:80]}",)


def _texts(path: Value) -> list[str]:
    return [path.const] if isinstance(path.const, str) else [str(word) for word in path.words]


def _fits_both(path: Value) -> str:
    """The pattern that fits training and validation shards alike, `fineweb_*_*.bin`; "" where there is none."""
    for text in reversed(_texts(path)):
        piece = str(text).rsplit("/", 1)[-1].lower()
        if "*" in piece and piece != "*":
            stem = piece.split("*", 1)[0]
            if names_a_split(stem):
                return ""  # `val_like_train_*.bin`
            shards = [
                f"{stem}{word}_000000{suffix}"
                for word in ("val", "train")
                for suffix in (".bin", ".npy", ".pt", ".bin.zst")
            ]
            fits = [fnmatch.fnmatchcase(shard, piece) for shard in shards]
            return str(text) if any(fits[:4]) and any(fits[4:]) else ""
    return ""
