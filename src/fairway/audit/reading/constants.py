"""The value of an expression, as far as the text alone gives it. Nothing of the submission is executed: only the
operators, the plain methods and the decoders named here are applied, to constants, and within bounds."""

import ast
import operator
import posixpath
from collections.abc import Callable, Mapping
from typing import Any

from fairway.audit.reading import bounds
from fairway.audit.reading.builtin import attribute, call, name_of
from fairway.audit.reading.values import UNKNOWN, Closure, Scope, Where


class Spent(Exception):
    """The bound on evaluated expressions is reached."""


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.BitXor: operator.xor,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.RShift: operator.rshift,
    ast.LShift: operator.lshift,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Constants:
    """Evaluates expressions, for a reader who walks statements.

    inline: runs a closure's body; met: dotted name -> what the reader does where the script calls it
    """

    def __init__(
        self, inline: Callable[[Closure, list[Any], dict[str, Any]], Any], met: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.inline, self.met = inline, met
        self.known: dict[type, Callable[..., Any] | None] = {}  # kind of expression -> the method for it
        self.steps = 0
        self.made = 0  # bytes of all values
        self.limit = bounds.STEPS

    def value(self, node: ast.AST | None, scope: Scope) -> Any:
        """The value of `node`, or UNKNOWN. Spent when the bound is reached."""
        self.steps += 1
        if self.steps > self.limit:
            raise Spent
        kind = type(node)
        if kind not in self.known:
            self.known[kind] = getattr(self, f"_{kind.__name__}", None)
        found = self.known[kind]
        if found is None:
            return UNKNOWN
        return self._kept(found(node, scope))

    def apply(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """A whitelisted function on constants; what it refuses is UNKNOWN."""
        if any(each is UNKNOWN for each in arguments) or any(each is UNKNOWN for each in named.values()):
            return UNKNOWN
        try:
            return self._kept(function(*arguments, **named))
        except Spent:
            raise
        except Exception:  # whatever a library says of bad data: the value is not known
            return UNKNOWN

    def _kept(self, value: Any) -> Any:
        size = len(value) if isinstance(value, (str, bytes, bytearray, list, tuple)) else 0
        if size > bounds.UNPACKED_BYTES:
            return UNKNOWN
        if size > 65_536:
            self.made += size
            if self.made > bounds.UNPACKED_TOTAL:
                raise Spent
        return value

    # One method for each kind of expression.

    def _Constant(self, node: ast.Constant, scope: Scope) -> Any:
        return node.value

    def _Name(self, node: ast.Name, scope: Scope) -> Any:
        found = scope.get(node.id)
        return name_of(node.id) if found is None else found

    def _NamedExpr(self, node: ast.NamedExpr, scope: Scope) -> Any:
        value = self.value(node.value, scope)
        scope.names[node.target.id] = value
        return value

    def _Attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        return attribute(self.value(node.value, scope), node.attr)

    def _Lambda(self, node: ast.Lambda, scope: Scope) -> Any:
        return Closure(node, scope)

    def _JoinedStr(self, node: ast.JoinedStr, scope: Scope) -> Any:
        parts = [self.value(part, scope) for part in node.values]
        return UNKNOWN if any(part is UNKNOWN for part in parts) else "".join(parts)

    def _FormattedValue(self, node: ast.FormattedValue, scope: Scope) -> Any:
        value = self.value(node.value, scope)
        if node.format_spec is not None or not isinstance(value, (str, int)):
            return UNKNOWN
        return repr(value) if node.conversion in (114, 97) else str(value)

    def _Tuple(self, node: ast.Tuple, scope: Scope) -> Any:
        return tuple(self._elements(node.elts, scope))

    def _List(self, node: ast.List, scope: Scope) -> Any:
        return self._elements(node.elts, scope)

    def _Set(self, node: ast.Set, scope: Scope) -> Any:
        return self._elements(node.elts, scope)

    def _elements(self, nodes: list[ast.expr], scope: Scope) -> list[Any]:
        out: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                inner = self.value(node.value, scope)
                out += list(inner) if isinstance(inner, (list, tuple, range)) else [UNKNOWN]
            else:
                out.append(self.value(node, scope))
        return out

    def _Dict(self, node: ast.Dict, scope: Scope) -> Any:
        pairs = [
            (self.value(k, scope) if k else UNKNOWN, self.value(v, scope))
            for k, v in zip(node.keys, node.values, strict=True)
        ]
        return {key: value for key, value in pairs if isinstance(key, (str, bytes, int, tuple))}

    def _UnaryOp(self, node: ast.UnaryOp, scope: Scope) -> Any:
        value = self.value(node.operand, scope)
        if isinstance(node.op, ast.Not):
            return self.apply(operator.not_, value)
        return self.apply(_SIGNS[type(node.op)], value)

    def _BoolOp(self, node: ast.BoolOp, scope: Scope) -> Any:
        value: Any = UNKNOWN
        for each in node.values:
            value = self.value(each, scope)
            if value is UNKNOWN or bool(value) == isinstance(node.op, ast.Or):
                return value
        return value

    def _IfExp(self, node: ast.IfExp, scope: Scope) -> Any:
        test = self.value(node.test, scope)
        return UNKNOWN if test is UNKNOWN else self.value(node.body if test else node.orelse, scope)

    def _BinOp(self, node: ast.BinOp, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(left, Where) and isinstance(node.op, ast.Div):
            right = right.path if isinstance(right, Where) else right
            return Where(posixpath.join(left.path, right)) if isinstance(right, str) else UNKNOWN
        if isinstance(node.op, (ast.Mult, ast.Pow, ast.LShift)) and not _small(left, right, node.op):
            return UNKNOWN
        if isinstance(node.op, ast.Mod) and isinstance(left, (str, bytes)):
            return self.apply(operator.mod, left, right) if _plain_format(left) else UNKNOWN
        return self.apply(_OPERATORS.get(type(node.op), _none), left, right)

    def _Compare(self, node: ast.Compare, scope: Scope) -> Any:
        left = self.value(node.left, scope)
        for kind, each in zip(node.ops, node.comparators, strict=True):
            right = self.value(each, scope)
            holds = self.apply(_COMPARISONS[type(kind)], left, right)
            if holds is UNKNOWN or not holds:
                return holds
            left = right
        return True

    def _Subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        owner = self.value(node.value, scope)
        if isinstance(owner, Scope):  # globals()["name"]
            key = self.value(node.slice, scope)
            return (owner.get(key) or UNKNOWN) if isinstance(key, str) else UNKNOWN
        if not isinstance(owner, (str, bytes, bytearray, list, tuple, dict, range)):
            return UNKNOWN
        return self.apply(operator.getitem, owner, self.value(node.slice, scope))

    def _Slice(self, node: ast.Slice, scope: Scope) -> Any:
        ends = [None if end is None else self.value(end, scope) for end in (node.lower, node.upper, node.step)]
        return UNKNOWN if any(end is UNKNOWN for end in ends) else slice(*ends)

    def _ListComp(self, node: ast.ListComp, scope: Scope) -> Any:
        return self._comprehended(node.generators, lambda inner: self.value(node.elt, inner), scope)

    _SetComp = _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp, scope: Scope) -> Any:
        pairs = self._comprehended(
            node.generators, lambda inner: (self.value(node.key, inner), self.value(node.value, inner)), scope
        )
        return UNKNOWN if pairs is UNKNOWN else self.apply(dict, pairs)

    def _comprehended(self, loops: list[ast.comprehension], each: Callable[[Scope], Any], scope: Scope) -> Any:
        inner = Scope(outer=scope)
        out: list[Any] = []

        def nest(depth: int) -> bool:
            if depth == len(loops):
                out.append(each(inner))
                return True
            over = self.value(loops[depth].iter, inner)
            if not isinstance(over, (str, bytes, bytearray, list, tuple, dict, range)):
                return False
            for item in over:
                bind(loops[depth].target, item, inner)
                tests = [self.value(test, inner) for test in loops[depth].ifs]
                if any(test is UNKNOWN for test in tests):
                    return False
                if all(tests) and not nest(depth + 1):
                    return False
            return True

        return out if nest(0) else UNKNOWN

    def _Call(self, node: ast.Call, scope: Scope) -> Any:
        function = self.value(node.func, scope)
        arguments = self._elements(node.args, scope)
        named = {each.arg: self.value(each.value, scope) for each in node.keywords if each.arg}
        return call(self, node, function, arguments, named, scope)


def bind(target: ast.AST, value: Any, scope: Scope) -> None:
    """Assigns to a name or to a tuple of names; what is no name is left alone."""
    if isinstance(target, ast.Name):
        scope.names[target.id] = value
    elif isinstance(target, ast.Starred):
        bind(target.value, UNKNOWN, scope)
    elif isinstance(target, (ast.Tuple, ast.List)):
        parts = list(value) if isinstance(value, (list, tuple, str, bytes)) else []
        whole = len(parts) == len(target.elts) and not any(isinstance(each, ast.Starred) for each in target.elts)
        for number, each in enumerate(target.elts):
            bind(each, parts[number] if whole else UNKNOWN, scope)


def _none(left: Any, right: Any) -> Any:
    """An operator that is not followed (matrix products)."""
    return UNKNOWN


def _plain_format(form: str | bytes) -> bool:
    """No width that would make a text of any length: `%s` and `%d` alone."""
    text = form if isinstance(form, str) else form.decode("latin-1")
    return all(text[at + 1 : at + 2] in ("s", "d", "%") for at in range(len(text)) if text[at] == "%")


def _small(left: Any, right: Any, kind: ast.operator) -> bool:
    """Whether a product, a power or a shift stays within bounds."""
    if isinstance(left, int) and isinstance(right, int):
        if isinstance(kind, ast.Mult):
            return left.bit_length() + right.bit_length() < 1_000_000
        bits = left.bit_length() * right if isinstance(kind, ast.Pow) else left.bit_length() + right
        return bits < 1_000_000
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, bytes, bytearray, list, tuple)) and isinstance(times, int):
            return len(text) * max(times, 0) <= bounds.UNPACKED_BYTES
    return isinstance(left, float) and isinstance(right, (int, float)) and not isinstance(kind, ast.Pow)
