"""Which texts a script executes: exec and compile of what it unpacks, imports of neighbours, programs that it starts.

The script's own statements are walked once with constants alone (see `constants`): what a decoder would give for the
literals in it is worked out, and nothing is executed.
"""

import ast
import posixpath
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fairway.audit.reading import bounds
from fairway.audit.reading.constants import Constants, Spent
from fairway.audit.reading.folder import Folder
from fairway.audit.reading.notebooks import joined
from fairway.audit.reading.parsing import levels, parsed
from fairway.audit.reading.script import Gap, How, Layer, Script
from fairway.audit.reading.statements import Left, Returned, Statements
from fairway.audit.reading.texts import decoded
from fairway.audit.reading.tree import nodes
from fairway.audit.reading.unpacking import DECODERS
from fairway.audit.reading.values import UNKNOWN, Code, Held, Name, Scope, Space, Where

_STARTERS = [f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "Popen")]
_STARTERS += [f"os.{name}" for name in ("system", "popen", "execv", "execvp", "execve", "execvpe", "execl", "execlp")]
_TELLING = {"exec", "eval", "compile", "runpy", "marshal", "FunctionType", "import_module", "__import__", "CodeType"}
_TELLING |= {"spec_from_file_location", "SourceFileLoader", "module_from_spec", "builtins", "__builtins__"}
_STARTING = {"subprocess", "system", "popen", "execv", "execvp", "execve", "execvpe", "execl", "execlp"}
_STARTING |= {"spawnv", "spawnvp"}
_EVERYWHERE = {"exec", "eval", "compile"}  # as methods: model.eval(), torch.compile(), re.compile()
_OPENERS = ("open", "io.open", "codecs.open", "pathlib.Path.open")


class Reader:
    """Reads scripts of one folder, each once; what they share of bounds is counted together."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.done: dict[str, tuple[Script, Scope]] = {}
        self.open: list[str] = []  # the scripts being read, outermost first
        self.layers: list[Layer] = []  # of the innermost of them
        self.opaque: list[Gap] = []
        self.seen: set[tuple[str, int, int]] = set()  # calls that were met
        self.constants = Constants(self._inline, self._meetings())
        self.statements = Statements(self.constants, self._import)

    def script(self, path: str) -> Script:
        """A file of the folder by its relative path."""
        if path not in self.done:
            content = self.folder.read(path)
            found = Gap(0, "could not be opened") if content is None else decoded(content)
            lines: tuple[int, ...] = ()
            if isinstance(found, str) and path.endswith(".ipynb"):
                book = joined(found)
                found, lines = (book, ()) if isinstance(book, Gap) else book
            self.done[path] = self._read(path, found, Scope(), lines)
        return self.done[path][0]

    def _read(self, path: str, found: str | Gap, scope: Scope, lines: tuple[int, ...] = ()) -> tuple[Script, Scope]:
        """A text, its tree and what it executes, among the names of `scope`."""
        tree = found if isinstance(found, Gap) else parsed(found)
        text = "" if isinstance(found, Gap) else found
        if isinstance(tree, Gap):
            return Script(path, text, None, tree, lines=lines), scope
        kept, self.layers, self.opaque = (self.layers, self.opaque), [], []
        self.open.append(path)
        scope.names |= {"__file__": path.partition("!")[0]} | ({} if "__name__" in scope.names else self._named())
        try:
            self._walk(tree, scope)
            order = sorted(self.layers, key=lambda layer: (layer.line, layer.column))
            script = Script(path, text, tree, None, tuple(order), tuple(sorted(set(self.opaque), key=_place)), lines)
        finally:
            self.open.pop()
            self.layers, self.opaque = kept
        return script, scope

    def _named(self) -> dict[str, Any]:
        return {"__name__": "__main__" if len(self.open) == 1 else "imported"}

    def _walk(self, tree: ast.Module, scope: Scope) -> None:
        reached = [node for level in levels(tree) for node in level]
        words = {_word(node) for node in reached}
        if words & (_TELLING | _STARTING) or len(self.open) > 1 or len(reached) < 400:
            whole = False
            if not words & _TELLING:
                self.constants.limit = min(self.constants.limit, self.constants.steps + bounds.STEPS_TO_START)
            with suppress(Spent, Returned, Left, RecursionError):
                self.statements.block(tree.body, scope)
                whole = True
            self._unmet(reached, scope, whole)
        for node in reached:  # wherever an import stands, what it names is code of this submission
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._import(node, Scope())

    def _unmet(self, reached: list[ast.AST], scope: Scope, whole: bool) -> None:
        """Calls that the walk did not come to: in functions that nothing called with constants. What is not met then
        either, is dead code, unless the walk was cut short by its bound (`whole`)."""
        for function in [node for node in reached if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
            calls = [node for node in nodes(function) if isinstance(node, ast.Call) and _tells(node)]
            if any((self.open[-1], node.lineno, node.col_offset) not in self.seen for node in calls):
                self.constants.limit = self.constants.steps + 50_000
                inner = Scope({each.arg: UNKNOWN for each in nodes(function) if isinstance(each, ast.arg)}, scope)
                with suppress(Spent, Returned, Left, RecursionError):
                    self.statements.block(function.body, inner)
        for node in [] if whole else [node for node in reached if isinstance(node, ast.Call) and _tells(node)]:
            if not self._again(node):
                self._gap(node, f"`{_shown(node)}` stands behind more work than is followed")

    def _inline(self, closure: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        return self.statements.inline(closure, arguments, named)

    # What the reader wants to meet.

    def _meetings(self) -> dict[str, Callable[..., Any]]:
        met: dict[str, Callable[..., Any]] = {name: self._start for name in _STARTERS}
        met |= {name: self._open for name in _OPENERS}
        met |= {
            "exec": self._exec,
            "eval": self._exec,
            "runpy.run_path": self._run_file,
            "runpy.run_module": self._module,
        }
        met |= {"importlib.import_module": self._module, "__import__": self._module}
        met |= {"importlib.util.spec_from_file_location": self._from_file}
        met |= {"importlib.machinery.SourceFileLoader": self._from_file}
        met |= {"importlib.util.module_from_spec": lambda node, arguments, named, scope: arguments[0]}
        met |= {"types.FunctionType": self._exec, "pathlib.Path.read_text": self._read_text}
        met |= {"pathlib.Path.read_bytes": self._read_bytes, "pathlib.Path.write_text": self._write}
        met |= {"pathlib.Path.write_bytes": self._write, "tempfile.NamedTemporaryFile": self._temporary}
        met |= {"marshal.loads": lambda node, arguments, named, scope: UNKNOWN}
        return met

    def _exec(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        """exec, eval or FunctionType: of a text in place, or of something unknown."""
        given = arguments[0] if arguments else UNKNOWN
        text = given.text if isinstance(given, Code) else given
        if isinstance(text, (bytes, bytearray)):
            found = decoded(bytes(text))
            text = found if isinstance(found, str) else UNKNOWN
        if self._again(node):
            return UNKNOWN
        if not isinstance(text, str):
            self._gap(node, f"what `{_shown(node)}` executes could not be worked out from the text")
            return UNKNOWN
        if len(self.open) > bounds.LAYERS:
            self._gap(node, f"more than {bounds.LAYERS} texts within texts")
            return UNKNOWN
        source = self.folder.touched[-1] if self.folder.touched else ""
        self.folder.touched.clear()
        if source and self.folder.read(source) == text.encode():  # the file itself, executed as it stands
            if source in self.open:
                return UNKNOWN
            self.done[source] = self._read(source, text, scope.module)
            self._layer(node, "exec", self.done[source][0])
            return UNKNOWN
        space = next((each for each in arguments[1:] if isinstance(each, Scope)), scope.module)
        if isinstance(node.func, ast.Name) and node.func.id == "eval":
            value = self._evaluated(text, scope)
            if value is not UNKNOWN:
                return value
        text = text.strip() if "\n" not in text else text
        script = self._read(self._inner(), text, space)[0]
        self._layer(node, "exec", script, "" if source in self.open else source)
        return UNKNOWN

    def _evaluated(self, text: str, scope: Scope) -> Any:
        tree = parsed(f"({text.strip()}\n)")
        body = tree.body if isinstance(tree, ast.Module) else []
        return self.constants.value(body[0].value, scope) if body and isinstance(body[0], ast.Expr) else UNKNOWN

    def _inner(self) -> str:
        taken = sum(1 for layer in self.layers if layer.script.path.startswith(f"{self.open[-1]}!"))
        return f"{self.open[-1]}!inner{taken + 1 if taken else ''}"

    def _run_file(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        path = _path(arguments[0] if arguments else named.get("path_name", UNKNOWN))
        if self._again(node):
            return UNKNOWN
        if path is None:
            self._gap(node, f"which file `{_shown(node)}` runs could not be worked out from the text")
        elif not self._follow(node, "run", path):
            self._gap(node, f"it runs {path}, which is not in the folder")
        return UNKNOWN

    def _from_file(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        path = _path(arguments[1] if len(arguments) > 1 else named.get("location", UNKNOWN))
        if self._again(node):
            return UNKNOWN
        if path is None or not self._follow(node, "import", path):
            self._gap(node, f"which file `{_shown(node)}` loads could not be worked out from the text")
            return UNKNOWN
        found = self.folder.find(path, self.open[-1])
        return Space(self.done[found][1]) if found in self.done else UNKNOWN

    def _module(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        name = arguments[0] if arguments else UNKNOWN
        if not isinstance(name, str):
            return UNKNOWN
        path = self._module_path(name)
        if path and not self._again(node):
            self._follow(node, "import", path)
        return Space(self.done[path][1]) if path in self.done else Name(name)

    def _start(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        """A program: followed where it is Python and its script can be known."""
        words = [word for each in arguments for word in (each if isinstance(each, (list, tuple)) else [each])]
        words = [part for word in words for part in (word.split() if isinstance(word, str) else [word])]
        python = any(
            isinstance(word, str) and word.rpartition("/")[2].startswith(("python", "torchrun")) for word in words
        )
        if self._again(node) or not python:
            return UNKNOWN
        scripts = [path for path in map(_path, words) if path and path.endswith(".py")]
        if "-c" in words and words[-1] is not UNKNOWN and isinstance(arguments[0], (list, tuple)):
            text = arguments[0][list(arguments[0]).index("-c") + 1] if "-c" in arguments[0] else UNKNOWN
            if isinstance(text, str):
                self._layer(node, "run", self._read(self._inner(), text, Scope())[0])
                return UNKNOWN
        if scripts and any([self._follow(node, "run", path) for path in scripts]):
            return UNKNOWN
        if any(word is UNKNOWN for word in words) and not scripts and "-m" not in words:
            self._gap(node, f"which program `{_shown(node)}` starts could not be worked out from the text")
        return UNKNOWN

    def _open(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        path = _path(arguments[0]) if arguments else None
        if path is None:
            return UNKNOWN
        mode = arguments[1] if len(arguments) > 1 else named.get("mode", "r")
        text = not (isinstance(mode, str) and "b" in mode)
        if isinstance(mode, str) and ("w" in mode or "x" in mode):
            return _Written(path, None, text, [], self.folder.written)
        content = self._content(path)
        return Held(path, None if content is None else (_text(content) if text else content), text)

    def _temporary(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        suffix = named.get("suffix", "")
        path = f"/tmp/temporary{len(self.folder.written)}{suffix if isinstance(suffix, str) else ''}"
        return _Written(path, None, True, [], self.folder.written)

    def _read_text(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        content = self._read_bytes(node, arguments, named, scope)
        return _text(content) if isinstance(content, bytes) else UNKNOWN

    def _read_bytes(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        content = self._content(arguments[0])
        return UNKNOWN if content is None else content

    def _content(self, path: str) -> bytes | None:
        """A file's bytes, for constants."""
        found = self.folder.find(path, self.open[-1])
        if found is not None and found not in self.folder.written:
            self.folder.touched.append(found)
        return self.folder.read(found) if found else None

    def _write(self, node: ast.Call, arguments: list[Any], named: dict[str, Any], scope: Scope) -> Any:
        content = arguments[1] if len(arguments) > 1 else UNKNOWN
        if isinstance(content, (str, bytes, bytearray)):
            self.folder.written[_plain(arguments[0])] = content.encode() if isinstance(content, str) else bytes(content)
        return UNKNOWN

    # Layers.

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope) -> None:
        """Binds what an import binds, and follows it where it names a file of the folder."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                space = self._imported(node, alias.name)
                top = alias.asname or alias.name.split(".")[0]
                plain = Name(alias.name if alias.asname else top)
                scope.names[top] = plain if space is None else Space(space)
            return
        base = "." * node.level + (node.module or "")
        space = self._imported(node, base)
        for alias in node.names:
            if alias.name == "*":
                scope.names |= _exported(base) if space is None else space.names
                continue
            inner = self._imported(node, f"{base}.{alias.name}" if node.module else f"{base}{alias.name}")
            found = (
                Space(inner) if inner is not None else None if space is None else space.names.get(alias.name, UNKNOWN)
            )
            scope.names[alias.asname or alias.name] = Name(f"{base}.{alias.name}") if found is None else found

    def _imported(self, node: ast.AST, name: str) -> Scope | None:
        path = self._module_path(name)
        if path is None:
            return None
        self._follow(node, "import", path)
        return self.done[path][1] if path in self.done else Scope()

    def _module_path(self, name: str) -> str | None:
        stem = name.lstrip(".").replace(".", "/")
        up = "../" * max(len(name) - len(name.lstrip(".")) - 1, 0)
        for path in (f"{up}{stem}.py", f"{up}{stem}/__init__.py") if stem else ():
            found = self.folder.find(path, self.open[-1])
            if found:
                return found
        return None

    def _follow(self, node: ast.AST, how: How, path: str) -> bool:
        """Reads the file that is executed, unless it is being read already (a circle)."""
        found = self.folder.find(path, self.open[-1].partition("!")[0])
        if found is None:
            return False
        if found not in (name.partition("!")[0] for name in self.open):
            if len(self.open) > bounds.LAYERS * 2:
                self._gap(node, "too many files that execute one another")
            elif found in self.folder.written:  # what it writes itself came out of its own text
                self._layer(node, how, self._read(self._inner(), decoded(self.folder.written[found]), Scope())[0])
            else:
                self._layer(node, how, self.script(found))
        return True

    def _layer(self, node: Any, how: How, script: Script, source: str = "") -> None:
        made = Layer(node.lineno, node.col_offset, how, script, source)
        if made.script.path not in [layer.script.path for layer in self.layers if layer.line == made.line]:
            self.layers.append(made)

    def _again(self, node: ast.Call) -> bool:
        """Whether this call was met before."""
        key = (self.open[-1], node.lineno, node.col_offset)
        met = key in self.seen
        self.seen.add(key)
        return met

    def _gap(self, node: Any, why: str) -> None:
        self.opaque.append(Gap(node.lineno, why))


class _Written(Held):
    """A file opened for writing: what is written can be run later."""

    def __init__(self, path: str, content: Any, text: bool, written: list[Any], files: dict[str, bytes]) -> None:
        super().__init__(path, content, text, written)
        self.files = files

    def kept(self) -> None:
        if isinstance(self.content, bytes):
            self.files[_plain(self.path)] = self.content


def _word(node: ast.AST) -> str:
    """The name by which a node may execute a text."""
    if isinstance(node, ast.Attribute):
        return "" if node.attr in _EVERYWHERE else node.attr
    return node.id if isinstance(node, ast.Name) else node.name if isinstance(node, ast.alias) else ""


def _tells(node: ast.Call) -> bool:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return name in ("exec", "eval", "run_path", "FunctionType", "spec_from_file_location") and (
        isinstance(node.func, ast.Name) or name not in ("exec", "eval")
    )


def _exported(module: str) -> dict[str, Any]:
    """What a star import of a module of decoders brings."""
    names = [name for name in DECODERS if name.rpartition(".")[0] == module]
    return {name.rpartition(".")[2]: Name(name) for name in names}


def _place(gap: Gap) -> tuple[int, str]:
    return gap.line, gap.why


def _plain(path: str) -> str:
    return posixpath.normpath(path)


def _path(value: Any) -> str | None:
    return value.path if isinstance(value, (Where, Held)) else value if isinstance(value, str) else None


def _text(content: bytes) -> Any:
    found = decoded(content)
    return found if isinstance(found, str) else UNKNOWN


def _shown(node: ast.AST) -> str:
    try:
        text = ast.unparse(node)
    except RecursionError:
        return "exec"
    return text if len(text) < 60 else text[:57] + "..."
