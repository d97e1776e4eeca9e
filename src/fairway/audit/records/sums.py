"""The sum of bytes that a script holds against the limit: what it adds up, followed through names and helpers."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from fairway.audit.reading import Script
from fairway.audit.reading.tree import last_name, nodes

LIMIT = 16_000_000
MIB = 16 * 1024 * 1024
_MOST = 4_000  # expressions followed from one sum
_STEPS = 14  # from a sum to the script's own text: ten at most in 127 scripts that have such a sum


@dataclass(frozen=True)
class Sum:
    """One sum: where it is judged, against which limit (None: it is only printed), and whether code is part of it."""

    script: Script
    line: int
    limit: int | None
    code: bool
    alone: bool  # nothing is added to the size of one thing
    larger: int = 0  # the line in which the larger of code and artifact stands for their sum


def sums(script: Script) -> list[Sum]:
    """Every comparison of a size with 16 MB or 16 MiB, and every print of a total submission size."""
    found = []
    for each in script.all():
        if each.tree is None:
            continue
        sources = _Sources(each.tree)
        for node in nodes(each.tree):
            if isinstance(node, ast.Compare):
                found += _compared(each, node, sources)
            elif isinstance(node, ast.JoinedStr):
                found += _printed(each, node, sources)
    return found


def _compared(script: Script, node: ast.Compare, sources: "_Sources") -> list[Sum]:
    sides = [node.left, *node.comparators]
    asked = [(side, limit, _limit(side, limit, sources)) for side in sides for limit in (LIMIT, MIB)]
    limits = [(side, limit, said) for side, limit, said in asked if said is not None]
    limits += [(side, MIB, side) for side in sides if not limits and LIMIT < (_product(side, sources) or 0) <= MIB]
    if len(sides) != 2 or not limits:
        return []
    side, limit, said = limits[0]
    other = sides[1] if side is sides[0] else sides[0]
    reached = list(sources.reached(other))
    if not any(_is_size(each) for each in reached):
        return []
    code = any(_is_code(each) for each in [*reached, *sources.reached(side)])
    line = _written_at(said, sources) if limit == MIB else node.lineno
    return [Sum(script, line, limit, code, _alone(other, sources), _larger(reached, sources))]


def _larger(reached: list[ast.AST], sources: "_Sources") -> int:
    """max(code, artifact): one leads to the code, another to a size without it."""
    for call in reached:
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "max" and len(call.args) > 1:
            sides = [list(sources.reached(each, _MOST)) for each in call.args]
            coded = [any(map(_is_code, side)) for side in sides]
            if any(coded) and any(any(map(_is_size, side)) for side, own in zip(sides, coded, strict=True) if not own):
                return call.lineno
    return 0


def _written_at(side: ast.expr, sources: "_Sources") -> int:
    """Where a limit stands that a name leads to: LIMIT = 16 * 2**20, or the default of a setting."""
    lines = []
    for each in sources.of(side):
        values = [each, *(_defaults(each) if isinstance(each, ast.Call) else ())]
        lines += [each.lineno] if any(LIMIT < (_folded(value) or 0) <= MIB for value in values) else []
    return lines[0] if len(lines) == 1 else side.lineno


def _printed(script: Script, node: ast.JoinedStr, sources: "_Sources") -> list[Sum]:
    says = _says(node)
    values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    if "total" not in says or "size" not in says or "submission" not in says or not values:
        return []
    reached = [each for value in values for each in sources.reached(value)]
    if not any(_is_size(each) for each in reached):
        return []
    return [Sum(script, node.lineno, None, any(map(_is_code, reached)), all(_alone(v, sources) for v in values))]


def _limit(node: ast.expr, limit: int, sources: "_Sources") -> ast.expr | None:
    """Where this limit is written, of which an expression is a name, or it with something taken off; None where it is
    none."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:  # `x = x - y` names itself
            continue
        seen.add(id(each))
        if _folded(each) == limit or (
            isinstance(each, ast.Call) and any(_folded(value) == limit for value in _defaults(each))
        ):
            return each
        waiting += sources.of(each)
        if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Sub):
            waiting.append(each.left)
    return None


def _product(node: ast.expr, sources: "_Sources") -> float | None:
    """The value of LIMIT_MB * 1024**2, names followed."""
    whole = _folded(node)
    if whole is not None:
        return whole
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _product(node.left, sources), _product(node.right, sources)
        return None if left is None or right is None else left * right
    values = [value for each in sources.of(node) if (value := _folded(each)) is not None]
    return values[0] if len(values) == 1 else None


def _defaults(call: ast.Call) -> Iterator[ast.expr]:
    """int(os.environ.get("LIMIT", 16_000_000)): the defaults of a setting, and what int() wraps; those of a field of a
    dataclass, field(default_factory=lambda: ...)."""
    named = [word.value for word in call.keywords if word.arg in ("default", "default_factory")]
    for each in (*call.args, *(value.body if isinstance(value, ast.Lambda) else value for value in named)):
        yield each
        if isinstance(each, ast.Call):
            yield from _defaults(each)


def _folded(node: ast.expr) -> float | None:
    """The value of an arithmetic constant."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and node.value.replace("_", "").isdigit() and len(node.value) < 15:
            return int(node.value)
        return node.value if isinstance(node.value, (int, float)) else None
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("int", "float")
        and node.args
    ):
        return _folded(node.args[0])
    if isinstance(node, ast.BinOp):
        left, right = _folded(node.left), _folded(node.right)
        if left is not None and right is not None and max(abs(left), abs(right)) < 1e9:
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.LShift) and right < 64 and left == int(left) and right == int(right):
                return int(left) << int(right)
            if isinstance(node.op, ast.Pow) and 0 <= right < 40 and abs(left) <= 1024:
                return left**right
    return None


def _is_size(node: ast.AST) -> bool:
    """The size of a file or of bytes in memory."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("len", "getsize")
    return isinstance(node, ast.Attribute) and node.attr in ("st_size", "getsize", "nbytes", "tell")


def _is_code(node: ast.AST) -> bool:
    """Something that leads to the script's own text."""
    if isinstance(node, ast.Name):
        return node.id == "__file__"
    if isinstance(node, ast.Attribute):
        return node.attr in ("getsource", "getsourcefile", "__file__")
    if isinstance(node, ast.Subscript):  # sys.argv[0]: the other words are arguments
        return last_name(node.value) == "argv" and isinstance(node.slice, ast.Constant) and node.slice.value == 0
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".py")


def squeezed(script: Script) -> ast.expr | None:
    """len(compress(the script's own text)), which no file has that could run: neither the script, nor a wrapper of it,
    which would be encoded as text. None where the code is weighed as it is, and where this is only shown in a message.
    """
    for each in script.all():
        if each.tree is None:
            continue
        sources = _Sources(each.tree)
        written = {
            ast.dump(inner.func)
            for call in nodes(each.tree)
            if isinstance(call, ast.Call) and last_name(call.func) in ("write", "write_bytes")
            for inner in call.args
            if isinstance(inner, ast.Call)
        }
        shown = _shown(each.tree)
        for node in nodes(each.tree):
            if not (isinstance(node, ast.Call) and last_name(node.func) == "len" and node.args) or id(node) in shown:
                continue
            for packed in [node.args[0], *sources.of(node.args[0])]:
                if not isinstance(packed, ast.Call) or not packed.args or not _is_own_text(packed.args[0], sources):
                    continue
                if _compresses(last_name(packed.func)) or ast.dump(packed.func) in written:
                    return node
    return None


def _shown(tree: ast.Module) -> set[int]:
    """The ids of what stands in messages alone, itself or by a name: anything in one that gives no total, a number of
    its own in one that does."""
    messages = [node for node in nodes(tree) if isinstance(node, ast.JoinedStr)]
    values = [
        (message, part.value) for message in messages for part in message.values if isinstance(part, ast.FormattedValue)
    ]
    shown = {id(value) for _, value in values}
    inside = shown | {id(part) for message, value in values if "total" not in _says(message) for part in nodes(value)}
    used: dict[str, list[bool]] = {}
    for node in nodes(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.setdefault(node.id, []).append(id(node) in inside)
    named = (node for node in nodes(tree) if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    return shown | {id(node.value) for node in named if all(used.get(ast.unparse(node.targets[0]), [False]))}


def _says(message: ast.JoinedStr) -> str:
    return "".join(str(part.value) for part in message.values if isinstance(part, ast.Constant)).lower()


def _compresses(name: str) -> bool:
    """zlib.compress, a helper compress_blob: by its name; not what takes it back."""
    return "compress" in name.lower() and "decompress" not in name.lower()


def _is_own_text(node: ast.expr, sources: "_Sources") -> bool:
    """The script's text, read here or under a name that is given nothing else."""
    names = [part for part in nodes(node) if isinstance(part, ast.Name)]
    given = [[each for each in sources.of(part) if ast.dump(each) != ast.dump(part)] for part in names]  # write(code)
    texts = [part for one in (node, *(each[0] for each in given if len(each) == 1)) for part in nodes(one)]
    plain = {"Path", "open", "read", "read_bytes", "read_text", "encode", "getsource", "abspath", "resolve", "str"}
    called = {last_name(part.func) for part in texts if isinstance(part, ast.Call)}
    return all(len(each) < 2 for each in given) and any(map(_is_code, texts)) and called <= plain


def _alone(node: ast.expr, sources: "_Sources") -> bool:
    """Whether an expression is one size to which nothing is added."""
    first = [node, *sources.of(node)]
    return not any(isinstance(each, ast.BinOp) and isinstance(each.op, ast.Add) for each in first) and not any(
        isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id == "sum" for each in first
    )


class _Sources:
    """name -> the expressions that a script ever gives it, by assignment, by argument or as a function's value, or that
    the function gives it in which it stands; [key]: what dicts hold under it."""

    def __init__(self, tree: ast.Module) -> None:
        self.given: dict[str, list[ast.expr]] = {}
        self.own: dict[tuple[int, str], list[ast.expr]] = {}  # of a function's own names, which are no arguments of it
        functions = {
            node.name: node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        self.around = {  # the innermost function: it comes last
            id(each): function
            for function in nodes(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for each in nodes(function)
        }
        self.members: dict[tuple[str, str], list[ast.expr]] = {}  # (class, field): what its makers give it
        self.inside = {
            id(each): node.name for node in nodes(tree) if isinstance(node, ast.ClassDef) for each in nodes(node)
        }
        fields = {
            node.name: [last_name(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
            for node in nodes(tree)
            if isinstance(node, ast.ClassDef)
        }  # of dataclasses and named tuples
        for node in nodes(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._give(target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._give(node.target, node.iter)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        self.given.setdefault(f"[{key.value}]", []).append(value)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._give(node.optional_vars, node.context_expr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
                for each in node.keywords:
                    self.given.setdefault(f"[{each.arg}]", []).append(each.value)
            elif isinstance(node, ast.Call):
                function = functions.get(last_name(node.func))
                if function is not None:
                    self._pass([each.arg for each in [*function.args.posonlyargs, *function.args.args]], node)
                elif last_name(node.func) in fields:
                    kind = last_name(node.func)
                    self._pass(fields[kind], node)
                    for name, value in [*zip(fields[kind], node.args, strict=False), *_named(node)]:
                        self.members.setdefault((kind, name), []).append(value)
        for name, function in functions.items():
            returned = [each.value for each in nodes(function) if isinstance(each, ast.Return) and each.value]
            self.given.setdefault(f"{name}()", []).extend(returned)
            if any(last_name(each) in ("property", "cached_property") for each in function.decorator_list):
                self.given.setdefault(name, []).extend(returned)

    def of(self, node: ast.expr) -> list[ast.expr]:
        """What a name, an attribute or a call of a helper stands for."""
        if isinstance(node, ast.Name):
            function = self.around.get(id(node))
            own = self.own.get((id(function), node.id)) if function is not None else None
            return (own or self.given.get(node.id, []))[:20]
        own = self.members.get((self.inside.get(id(node), ""), getattr(node, "attr", "")))
        if own is not None and isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            return own[:20]
        if isinstance(node, ast.Attribute):  # Namespace(**dict(limit=16_000_000)): keys are fields
            return (self.given.get(node.attr) or self.given.get(f"[{node.attr}]", []))[:20]
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            return self.given.get(f"[{node.slice.value}]", [])[:20]
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            return self.given.get(f"{name}()", [])[:20]
        return []

    def reached(self, node: ast.expr, steps: int = _STEPS) -> Iterator[ast.AST]:
        """Every expression that an expression may come from, each once, nearest first, within bounds: fields of one
        name lead to all that ever had it, and further off to all of the script."""
        seen = {id(node)}
        nearest: list[ast.AST] = [node]
        for _ in range(steps):
            further: list[ast.AST] = []
            for each in nearest:
                yield each
                for part in self._parts(each):
                    if id(part) not in seen and len(seen) < _MOST:
                        seen.add(id(part))
                        further.append(part)
            nearest = further
        yield from nearest

    def _parts(self, node: ast.AST) -> list[ast.AST]:
        """What an expression is made of, and what its names stand for: of what a function of the script gives, its
        arguments are parts by their names in it."""
        stands_for: list[ast.AST] = [*self.of(node)] if isinstance(node, ast.expr) else []
        called = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if called is not None and stands_for:
            return stands_for
        # What is called by its name is no field: `len(blob)` beside `self.len = n`.
        return [*(part for part in ast.iter_child_nodes(node) if part is not called), *stands_for]

    def _give(self, target: ast.AST, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            parts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            for number, each in enumerate(target.elts):
                self._give(each, parts[number] if len(parts) == len(target.elts) else value)
        name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", None)
        if name:
            self.given.setdefault(name, []).append(value)
        function = self.around.get(id(target)) if isinstance(target, ast.Name) else None
        if function is not None and name not in {
            each.arg for each in nodes(function.args) if isinstance(each, ast.arg)
        }:
            self.own.setdefault((id(function), str(name)), []).append(value)

    def _pass(self, names: list[str], call: ast.Call) -> None:
        names = names[1:] if names[:1] == ["self"] else names
        for name, value in zip(names, call.args, strict=False):
            self.given.setdefault(name, []).append(value)
        for each in call.keywords:
            if each.arg:
                self.given.setdefault(each.arg, []).append(each.value)


def _named(call: ast.Call) -> list[tuple[str, ast.expr]]:
    return [(each.arg, each.value) for each in call.keywords if each.arg]
