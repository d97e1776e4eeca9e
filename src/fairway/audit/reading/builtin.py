"""Names, attributes and calls that a packed script uses to unpack itself: the whole whitelist."""

import ast
import functools
import json
import operator
import posixpath
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fairway.audit.reading import bounds
from fairway.audit.reading.unpacking import DECODERS, LZMA_NAMES
from fairway.audit.reading.values import UNKNOWN, Closure, Code, Held, Method, Name, Scope, Space, Where

if TYPE_CHECKING:
    from fairway.audit.reading.constants import Constants

_METHODS = {
    str: "encode join replace strip lstrip rstrip split splitlines lower upper startswith endswith translate swapcase "
    "removeprefix removesuffix partition rpartition isdigit title index find count rsplit",
    bytes: "decode join replace strip lstrip rstrip split startswith endswith translate hex find index count",
    bytearray: "decode join replace strip hex find extend append reverse",
    list: "append extend index reverse copy pop insert count sort",
    tuple: "index count",
    dict: "get keys values items copy update setdefault pop",
    int: "to_bytes bit_length",
}
_PLAIN: dict[str, Callable[..., Any]] = {
    **{
        f.__name__: f
        for f in (bytes, bytearray, str, chr, ord, len, int, float, bool, range, divmod, abs, sum, min, max)
    },
    **{f.__name__: f for f in (list, tuple, dict, slice, hex, bin, repr, ascii)},
    "set": list,
    "frozenset": list,
    "memoryview": bytes,
    "reversed": lambda x: list(reversed(x)),
    "sorted": lambda x, reverse=False: sorted(x, reverse=reverse),
    "enumerate": lambda x, start=0: list(enumerate(x, start)),
    "zip": lambda *x, strict=False: list(zip(*x, strict=False)),
    "iter": list,
    "int.from_bytes": int.from_bytes,
    "str.maketrans": str.maketrans,
    "bytes.maketrans": bytes.maketrans,
    "json.loads": json.loads,
    "ast.literal_eval": lambda x: ast.literal_eval(x) if len(x) < bounds.CODE_CHARACTERS else UNKNOWN,
    "itertools.chain": lambda *x: [each for part in x for each in part],
    "operator.add": operator.add,
    "operator.xor": operator.xor,
    "os.fspath": lambda x: x,
    "textwrap.dedent": textwrap.dedent,
}
_PATHS: dict[str, Callable[..., Any]] = {
    "join": posixpath.join,
    "dirname": posixpath.dirname,
    "basename": posixpath.basename,
    "normpath": posixpath.normpath,
    **dict.fromkeys(("abspath", "realpath", "expanduser"), lambda x: x),
    "splitext": posixpath.splitext,
}
_SIZED = {"replace", "join", "translate", "to_bytes", "split"}
_BUILTINS = {*_PLAIN, "open", "exec", "eval", "compile", "map", "filter", "getattr", "globals", "locals", "vars"}
_BUILTINS |= {"__import__", "__builtins__", "print", "isinstance", "hasattr", "setattr"}


def name_of(name: str) -> Any:
    """A name that the script did not bind: a builtin, or UNKNOWN."""
    return Name("builtins" if name == "__builtins__" else name) if name in _BUILTINS else UNKNOWN


def attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, Name):
        if owner.dotted == "builtins":
            return name_of(name)
        if owner.dotted == "lzma" and name in LZMA_NAMES:
            return LZMA_NAMES[name]
        return {"sys.executable": "python", "os.sep": "/"}.get(f"{owner.dotted}.{name}", Name(f"{owner.dotted}.{name}"))
    if isinstance(owner, Space):
        found = owner.scope.names.get(name)
        return UNKNOWN if found is None else found
    if isinstance(owner, Where):
        parts = {"parent": posixpath.dirname(owner.path), "name": posixpath.basename(owner.path)}
        parts["stem"] = parts["name"].rpartition(".")[0] or parts["name"]
        if name in parts:
            return Where(parts[name]) if name == "parent" else parts[name]
        return Method(owner, name)
    if isinstance(owner, Held):
        return owner.path if name == "name" else Method(owner, name)
    return UNKNOWN if owner is UNKNOWN else Method(owner, name)


def call(
    constants: "Constants",
    node: ast.Call,
    function: Any,
    arguments: list[Any],
    named: dict[str, Any],
    scope: Scope,
) -> Any:
    """A call of something on the whitelist, or of what the reader wants to meet; everything else is UNKNOWN."""
    if isinstance(function, Closure):
        return constants.inline(function, arguments, named)
    if isinstance(function, Method):
        return _method(constants, node, function, arguments, named, scope)
    if not isinstance(function, Name):
        return UNKNOWN
    name = function.dotted.removeprefix("builtins.")
    if name in constants.met:
        return constants.met[name](node, arguments, named, scope)
    if name in DECODERS:
        return constants.apply(DECODERS[name], *arguments, **named)
    if name in ("bytes", "bytearray", "range") and any(isinstance(x, int) and abs(x) > 10_000_000 for x in arguments):
        return UNKNOWN
    if name in _PLAIN:
        return constants.apply(_PLAIN[name], *arguments, **named)
    if name.startswith(("os.path.", "posixpath.")):
        paths = [each.path if isinstance(each, Where) else each for each in arguments]
        return constants.apply(_PATHS.get(name.rpartition(".")[2], lambda *_: UNKNOWN), *paths)
    special = _SPECIAL.get(name)
    return UNKNOWN if special is None else special(constants, node, arguments, named, scope)


def _method(
    constants: "Constants", node: ast.Call, method: Method, arguments: list[Any], named: dict[str, Any], scope: Scope
) -> Any:
    owner, name = method.owner, method.name
    if isinstance(owner, Where):
        met = constants.met.get(f"pathlib.Path.{name}")
        return met(node, [owner.path, *arguments], named, scope) if met else _path_method(owner, name, arguments)
    if isinstance(owner, Held):
        return _file_method(owner, name, arguments)
    if isinstance(owner, Code) or name not in _METHODS.get(type(owner), "").split():
        return UNKNOWN
    if name in _SIZED and not _bounded(owner, name, arguments):
        return UNKNOWN
    if name == "decode" and arguments[:1] and isinstance(arguments[0], str):
        return constants.apply(DECODERS["codecs.decode"], owner, *arguments, **named)
    if isinstance(owner, (list, bytearray, dict)) and any(each is UNKNOWN for each in arguments):
        if isinstance(owner, list) and name == "append":
            owner.append(UNKNOWN)
        return UNKNOWN
    made = constants.apply(getattr(owner, name), *arguments, **named)
    return list(made) if name in ("keys", "values", "items") and made is not UNKNOWN else made


def _bounded(owner: Any, name: str, arguments: list[Any]) -> bool:
    if name == "replace":
        return len(arguments) > 1 and len(owner) * max(len(arguments[1]), 1) <= 8 * bounds.UNPACKED_BYTES
    if name == "join":
        parts = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else []
        return all(isinstance(part, (str, bytes)) for part in parts) and (
            sum(len(part) + len(owner) for part in parts) <= bounds.UNPACKED_BYTES
        )
    if name == "translate":
        table = arguments[0] if arguments else None
        return not isinstance(table, dict) or all(len(str(each)) < 9 for each in table.values())
    if name == "to_bytes":
        return bool(arguments) and isinstance(arguments[0], int) and arguments[0] * 8 <= bounds.INTEGER_BITS
    return True


def _path_method(owner: Where, name: str, arguments: list[Any]) -> Any:
    if name in ("resolve", "absolute", "expanduser"):
        return owner
    texts = [each.path if isinstance(each, Where) else each for each in arguments]
    if not all(isinstance(each, str) for each in texts):
        return UNKNOWN
    if name == "joinpath":
        return Where(posixpath.join(owner.path, *texts))
    if name in ("with_name", "with_suffix") and texts:
        stem = posixpath.dirname(owner.path)
        base = texts[0] if name == "with_name" else posixpath.basename(owner.path).rpartition(".")[0] + texts[0]
        return Where(posixpath.join(stem, base))
    return owner.path if name in ("as_posix", "__str__") else UNKNOWN


def _file_method(owner: Held, name: str, arguments: list[Any]) -> Any:
    if name in ("read", "getvalue", "getbuffer", "readall"):
        return UNKNOWN if owner.content is None else owner.content
    if name in ("readlines", "readline") and isinstance(owner.content, (str, bytes)):
        rows = owner.content.splitlines(keepends=True)
        return rows if name == "readlines" else (rows[0] if rows else owner.content)
    if name == "write" and arguments:
        owner.written.append(arguments[0])
        parts = [each.encode() if isinstance(each, str) else each for each in owner.written]
        known = all(isinstance(each, (bytes, bytearray)) for each in parts)
        owner.content = b"".join(parts) if known else None
        owner.kept()
    return owner if name == "__enter__" else UNKNOWN


def _mapped(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    if len(arguments) != 2 or not isinstance(arguments[1], (list, tuple, str, bytes, bytearray, range)):
        return UNKNOWN
    return [call(constants, node, arguments[0], [each], {}, scope) for each in arguments[1]]


def _reduced(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    if len(arguments) < 2 or not isinstance(arguments[1], (list, tuple, str, bytes)):
        return UNKNOWN
    start = arguments[2:] or arguments[1][:1]
    rest = arguments[1] if arguments[2:] else arguments[1][1:]
    return functools.reduce(lambda a, b: call(constants, node, arguments[0], [a, b], {}, scope), rest, *start)


def _getattr(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    return attribute(*arguments[:2]) if len(arguments) > 1 and isinstance(arguments[1], str) else UNKNOWN


def _imported(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    return Name(arguments[0]) if arguments and isinstance(arguments[0], str) else UNKNOWN


def _compiled(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    source = arguments[0] if arguments else named.get("source", UNKNOWN)
    text = source.decode("utf-8", "replace") if isinstance(source, (bytes, bytearray)) else source
    return Code(text) if isinstance(text, str) else UNKNOWN


def _path(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    texts = [each.path if isinstance(each, Where) else each for each in arguments]
    return Where(posixpath.join(*texts) if texts else ".") if all(isinstance(x, str) for x in texts) else UNKNOWN


def _buffer(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
    return Held("", arguments[0] if arguments else b"")


def _unzipping(name: str) -> Callable[..., Any]:
    """gzip.GzipFile(fileobj=...), lzma.open(...) and their like on a buffer that is held."""

    def opened(
        constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope
    ) -> Any:
        source = named.get("fileobj", arguments[0] if arguments else UNKNOWN)
        if not isinstance(source, Held) or source.content is None:
            return UNKNOWN
        content = constants.apply(DECODERS[name], source.content)
        return UNKNOWN if content is UNKNOWN else Held("", content)

    return opened


def _incremental(plain: str) -> Callable[..., Any]:
    """zlib.decompressobj() and its like: their `decompress` is the module's."""

    def made(constants: "Constants", node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        bits = arguments[0] if arguments else named.get("wbits", 15)
        return Name("gzip" if plain == "zlib" and bits in (31, 47) else plain)

    return made


_SPECIAL: dict[str, Callable[..., Any]] = {
    "zlib.decompressobj": _incremental("zlib"),
    "lzma.LZMADecompressor": _incremental("lzma"),
    "bz2.BZ2Decompressor": _incremental("bz2"),
    "zstandard.ZstdDecompressor": _incremental("zstandard"),
    "map": _mapped,
    "functools.reduce": _reduced,
    "getattr": _getattr,
    "__import__": _imported,
    "importlib.import_module": _imported,
    "compile": _compiled,
    "pathlib.Path": _path,
    "pathlib.PurePath": _path,
    "io.BytesIO": _buffer,
    "io.StringIO": _buffer,
    "gzip.GzipFile": _unzipping("gzip.decompress"),
    "gzip.open": _unzipping("gzip.decompress"),
    "lzma.open": _unzipping("lzma.decompress"),
    "lzma.LZMAFile": _unzipping("lzma.decompress"),
    "bz2.open": _unzipping("bz2.decompress"),
    "globals": lambda constants, node, arguments, named, scope: scope.module,
    "locals": lambda constants, node, arguments, named, scope: scope,
    "vars": lambda constants, node, arguments, named, scope: scope,
    "os.getcwd": lambda *_: ".",
    "tempfile.gettempdir": lambda *_: "/tmp",
    "tempfile.mkdtemp": lambda *_, **__: "/tmp/made",
}
