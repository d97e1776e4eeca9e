"""Files and paths as the standard library, numpy and torch open, read and write them."""

from __future__ import annotations

import ast
from functools import reduce
from typing import Any

from fairway.audit.beside import table_at, table_of
from fairway.audit.flow.methods import Methods
from fairway.audit.flow.values import (
    NONE,
    NOTHING,
    Value,
    blend,
    join,
)
from fairway.audit.settings import UNKNOWN


class Opening(Methods):
    """What opens, loads and saves."""

    def _do_open(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        mode = args[1] if len(args) > 1 else kwargs.get("mode", NOTHING)
        return self.ref(self.opened(self.path_of(args[0]), mode, node))

    def _do_Path(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.path(args, node)

    _do_PurePath = _do_Path

    def _do_join(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if "path" not in name:
            return None
        paths = [self.path_of(each) for each in args]
        if all(isinstance(each.const, str) for each in paths):
            return Value(const="/".join(str(each.const) for each in paths), env=blend(*map(self.flat, paths)).env)
        return blend(*(Value(words=(each.const,)) if isinstance(each.const, str) else each for each in paths))

    def _do_dirname(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.piece_of_path(args[0], name.rsplit(".", 1)[-1]) if "path" in name and args else None

    _do_basename = _do_dirname

    def _do_split(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not name.endswith("path.split") or len(args) != 1:
            return None
        return Value(items=(self.piece_of_path(args[0], "dirname"), self.piece_of_path(args[0], "basename")))

    def _do_listdir(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._list_of(self.piece_of_path(args[0], ""), node) if args else None

    def _do_glob(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        path = self.path_of(args[0])
        words = (path.const,) if isinstance(path.const, str) else path.words
        return self._list_of(Value(words=words, env=path.env), node)

    _do_iglob = _do_glob

    def _load(self, last: str, args: list[Value], node: ast.AST | None) -> Value:
        if last == "load_dataset":
            words = [str(each.const) for each in args if isinstance(each.const, str)]
            return self.read_from(Value(words=tuple(words)), node)
        return self.read_from(self.path_of(args[0]), node)

    def _do_load(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name.startswith("json") and args:
            written = self.text_of(self.path_of(args[0])) in self.files.slots
            table = UNKNOWN if written else table_at(self.settings.tables, self.path_of(args[0]).const)
            if table is not UNKNOWN:
                return self.spelt(table, node)
        if name.startswith(("json", "pickle", "yaml", "toml", "marshal")) and args:
            return self.read_from(self.path_of(args[0]), node)
        if args and self._buffer(args[0]) is not None:
            return self._buffer(args[0])
        return None

    def spelt(self, told: Any, node: ast.AST | None) -> Value:
        """A table or list of constants, as if the script had written it out."""
        if isinstance(told, dict):
            table = self.new("dict", None, node)
            table.slots.update({("k", key): self.spelt(each, node) for key, each in told.items()})
            return self.ref(table)
        if isinstance(told, list):
            listed = self.new("list", None, node)
            listed.slots["#items"] = Value(items=tuple(self.spelt(each, node) for each in told))
            return self.ref(listed)
        return Value(const=told)

    def _buffer(self, value: Value) -> Value | None:
        """What was put into a BytesIO."""
        for obj in value.refs:
            if obj.kind == "thing" and obj.data == "buffer":
                content = obj.slots.get("#content", NOTHING)
                return content if isinstance(content, Value) else None
        return None

    def _do_BytesIO(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        buffer = self.new("thing", "buffer", node)
        if args:
            buffer.slots["#content"] = args[0]
        return self.ref(buffer)

    _do_StringIO = _do_BytesIO

    def _do_save(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        value, where = (args[1], args[0]) if name.startswith(("np", "numpy")) else (args[0], args[1])
        kept = self._saved(value)
        for obj in where.refs:
            if obj.kind == "thing" and obj.data == "buffer":
                self.heap.set(obj, "#content", kept)
                return NONE
        self.write_to(self.path_of(where), kept, node)
        return NONE

    def _saved(self, value: Value) -> Value:
        """What goes into a file: a copy of the values as they are now, in the same dicts."""
        return self.copied(value)

    def _do_dump(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._do_save("dump", args, kwargs, node)

    def _do_dumps(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """pickle.dumps and what packs its bytes: still the same dicts and tensors"""
        packs = bool(args and args[0].refs) and not name.startswith(("json", "yaml", "toml"))
        return self._saved(args[0]) if packs else None

    def _do_loads(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """pickle.loads, zlib.decompress: what was packed; json.loads of a text that is known"""
        if args and name.startswith("json") and isinstance(args[0].const, str):
            table = table_of(args[0].const)
            return None if table is UNKNOWN else self.spelt(table, node)
        packed = args and any(obj.kind in ("dict", "list", "instance", "tensor") for obj in args[0].refs)
        return args[0] if packed and not name.startswith(("json", "yaml", "toml")) else None

    _do_compress = _do_decompress = _do_loads

    def _do_save_file(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._do_save("save", args, kwargs, node)

    def _do_savez(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if args and len(args) == 1 and kwargs:
            table = self.new("dict", None, node)  # as it is read again: by the names of the arrays
            table.slots.update({("k", key): self.flat(each) for key, each in kwargs.items()})
            self.keep_in(self.path_of(args[0]), self.ref(table))
        elif args:
            given = [self.flat(each) for each in (*args[1:], *kwargs.values())]
            self.write_to(self.path_of(args[0]), blend(*given) if given else NOTHING, node)
        return NONE

    _do_savez_compressed = _do_savez

    def _do_run(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """subprocess.run(["lrzip", "-o", packed, raw]): what another program makes of a file that the script wrote lies
        in the other files that it is told of."""
        if not (name.startswith("subprocess.") and args):
            return None
        held = [each.slots.get("#items") for each in args[0].refs]
        listed = next((each.items for each in held if isinstance(each, Value) and each.items), args[0].items or ())
        paths = [
            text for text in (self.text_of(self.path_of(each)) for each in listed[1:]) if text[:1] not in ("", "-")
        ]
        written = [each for path in paths if isinstance(each := self.files.slots.get(path), Value)]
        for path in paths if written else ():
            if path not in self.files.slots:
                self.heap.set(self.files, path, reduce(join, written))
        return None

    _do_check_call = _do_check_output = _do_call = _do_Popen = _do_run

    def _do_write_bytes(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return None
