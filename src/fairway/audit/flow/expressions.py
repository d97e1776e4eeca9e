"""Expressions."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.comprehensions import Comprehensions
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.iteration import SETTINGS, is_option
from fairway.audit.flow.values import (
    GRAD,
    MISSING,
    NO_OBJECTS,
    NONE,
    NOTHING,
    TEXT,
    Value,
    blend,
    hashable,
    join,
)
from fairway.audit.reading.tree import nodes

_BUILTINS = frozenset(dir(builtins))
_OWN = frozenset(("function", "bound", "instance"))
_TRUE, _FALSE = Value(const=True), Value(const=False)


class Expressions(Comprehensions):
    """evaluate(node)"""

    def evaluate(self, node: ast.expr) -> Value:
        self.trace.steps += 1
        if self.trace.steps > self.fuel:
            self.burn()
        handler: Callable[[Any], Value] | None = getattr(self, f"_on_{type(node).__name__}", None)
        return handler(node) if handler is not None else NOTHING

    # Names.
    def _on_Constant(self, node: ast.Constant) -> Value:
        return Value(const=node.value)

    def _on_Name(self, node: ast.Name) -> Value:
        return self.name(node.id)

    def name(self, name: str) -> Value:
        """What a name stands for: local, enclosing, global, builtin."""
        frame = self.frame
        if name not in frame.outside:
            found = frame.obj.slots.get(name)
            if found is not None:
                return found
        for scope in frame.closure:
            found = scope.slots.get(name)
            if found is not None:
                return found
        found = frame.globals.slots.get(name)
        if found is not None:
            return found
        return self.outside(f"builtins.{name}") if name in _BUILTINS else NOTHING

    def _on_Attribute(self, node: ast.Attribute) -> Value:
        return self.get(self.evaluate(node.value), node.attr, node)

    def _on_Subscript(self, node: ast.Subscript) -> Value:
        base = self.evaluate(node.value)
        if any(obj.kind in ("function", "bound", "foreign") and obj.data != "os.environ" for obj in base.refs):
            self.evaluate_parts(node.slice)
            if any(obj.kind == "foreign" for obj in base.refs):
                return base
            return self.ref(self.new("kernel", None, node))
        parts = self.parts(node.slice)
        return self.item(base, parts, node)

    def evaluate_parts(self, node: ast.expr) -> None:
        """For what evaluating an index may do."""
        if not isinstance(node, ast.Slice):
            self.evaluate(node)

    def _on_Starred(self, node: ast.Starred) -> Value:
        return self.evaluate(node.value)

    def _on_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.evaluate(node.value)
        unknown = value.const is MISSING and self.plain(value) and not (value.flags or value.spans or value.words)
        if unknown and self.nest and not value.choices:  # while (c := next_chunk()) < n: another one each turn
            value = self.tagged(value, self.here()[-1:])
        self.assign(node.target, value)
        return value

    def _on_Await(self, node: ast.Await) -> Value:
        return self.evaluate(node.value)

    def _on_Yield(self, node: ast.Yield) -> Value:
        frame = self.frame
        if frame.sent is not None:  # it goes on from here
            return frame.sent
        value = self.evaluate(node.value) if node.value else NONE
        frame.yields.append(value)
        within, frame.within = frame.within, None
        if within is not None:
            within(value)
        return NOTHING

    def _on_YieldFrom(self, node: ast.YieldFrom) -> Value:
        inner = self.evaluate(node.value)
        self.frame.yields.append(self.elements(inner, node).any)
        found = [obj.slots["#result"] for obj in inner.refs if "#result" in obj.slots]
        return found[0] if found else NOTHING

    def _on_Lambda(self, node: ast.Lambda) -> Value:
        return self.function(node)

    def function(self, node: Any) -> Value:
        """The function object of a def or lambda."""
        frame = self.frame
        inner = frame.obj is not frame.globals
        closure = (frame.obj, *frame.closure) if inner else frame.closure
        obj = self.new("function", (node, frame.script, frame.globals, closure, frame.owner), node)
        spec: ast.arguments = node.args
        names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        defaults = {}
        if spec.defaults:
            for name, default in zip(names[-len(spec.defaults) :], spec.defaults, strict=False):
                defaults[name] = self.evaluate(default)
        for word, given in zip(spec.kwonlyargs, spec.kw_defaults, strict=False):
            if given is not None:
                defaults[word.arg] = self.evaluate(given)
        obj.slots["#defaults"] = defaults
        return self.ref(obj)

    # Calls.
    def _on_Call(self, node: ast.Call) -> Value:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id == "super" and self.frame.owner is not None:
                return self._super(node)
            if function.id in ("locals", "globals", "vars") and not node.args:
                view = self.new("dict", "vars", node)
                scope = self.frame.globals if function.id == "globals" else self.frame.obj
                view.slots.update({("k", k): v for k, v in scope.slots.items() if isinstance(v, Value)})
                return self.ref(view)
        if isinstance(function, ast.Attribute):
            base = self.evaluate(function.value)
            args, kwargs = self.arguments(node)
            self.frame.line = node.lineno
            lent = self._lent(base, node, args)
            result = self.method(base, function.attr, args, kwargs, node)
            self._given_back(lent)
            library = bool(base.refs) and all(obj.kind == "foreign" for obj in base.refs)
            return self.given_out(result, kwargs["out"], node) if library and "out" in kwargs else result
        called = self.evaluate(function)
        args, kwargs = self.arguments(node)
        self.frame.line = node.lineno
        lent = self._lent(called, node, args)
        result = self.call(called, args, kwargs, node)
        self._given_back(lent)
        return result

    def _lent(self, called: Value, node: ast.Call, args: list[Value]) -> list[tuple[ast.Subscript, Obj, Value]]:
        """Parts of sums that a function of the script is given, `book(sums[0], nll)`: as tensors of their own, for what
        it adds to them. Each with its tensor and what that holds."""
        found: list[tuple[ast.Subscript, Obj, Value]] = []
        if len(args) != len(node.args) or not any(obj.kind in _OWN for obj in called.refs):
            return found
        for place, part in enumerate(node.args):
            value = args[place]
            if not isinstance(part, ast.Subscript) or not isinstance(part.value, (ast.Name, ast.Attribute)):
                continue  # what is called is not called again
            if value.refs or value.items or value.const is not MISSING:
                continue
            sums = value.losses or self.plain(value)
            if sums and any(obj.kind == "tensor" and not self.learner(obj) for obj in self.evaluate(part.value).refs):
                cell = self.new("tensor", None, part)
                cell.slots["#content"] = value
                args[place] = self.ref(cell)
                found.append((part, cell, value))
        return found

    def _given_back(self, lent: list[tuple[ast.Subscript, Obj, Value]]) -> None:
        for part, cell, old in lent:
            if self.content(cell) is not old:
                self.assign(part, self.content(cell))

    def _super(self, node: ast.Call) -> Value:
        names = self.frame.node.args.args if self.frame.node is not None else []
        this = self.name(names[0].arg) if names else NOTHING
        for each in node.args[1:2]:
            this = self.evaluate(each)
        return self.ref(self.new("super", (self.frame.owner, this), node))

    def arguments(self, node: ast.Call) -> tuple[list[Value], dict[str, Value]]:
        """The values of a call's arguments."""
        args: list[Value] = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                elements = self.spread(self.evaluate(each.value), node)
                args += elements.exact if elements.exact is not None else [elements.any]
            else:
                args.append(self.evaluate(each))
        kwargs: dict[str, Value] = {}
        for word in node.keywords:
            value = self.evaluate(word.value)
            if word.arg is not None:
                kwargs[word.arg] = value
                continue
            if not value.refs and (value.states or value.toks):  # f(**torch.load(path)) of one file
                kwargs["**"] = value
            for obj in value.refs:
                for key, held in obj.slots.items():
                    if isinstance(key, tuple) and isinstance(key[1], str):
                        kwargs[key[1]] = held
                if "#elem" in obj.slots and obj.kind == "dict":
                    kwargs["**"] = obj.slots["#elem"]
        return args, kwargs

    # Operators.
    def _on_BinOp(self, node: ast.BinOp) -> Value:
        left, right = self.evaluate(node.left), self.evaluate(node.right)
        result = self.binop(node.op, left, right, node)
        return self.again(left, right, result, node.right) if isinstance(node.op, ast.Mod) else result

    def _on_UnaryOp(self, node: ast.UnaryOp) -> Value:
        value = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            held = self.truth(value)
            return (
                Value(const=not held, env=value.env, choices=value.choices) if held is not None else self._plain(value)
            )
        if value.const is not MISSING and isinstance(value.const, (int, float)) and not value.refs:
            const = -value.const if isinstance(node.op, ast.USub) else value.const
            if isinstance(node.op, ast.Invert):
                return NOTHING
            less = frozenset((repr(value.const),)) if isinstance(node.op, ast.USub) else value.less
            return Value(const=const, less=less, env=value.env)
        flat = self.flat(value)
        if isinstance(node.op, ast.Invert) and flat.cuts:
            turned = frozenset(("head" if cut[0] == "tail" else "tail", cut[1], cut[2]) for cut in flat.cuts)
            return flat.but(cuts=turned, const=MISSING)
        if isinstance(node.op, ast.USub) and self.plain(flat):
            name = ast.unparse(node.operand)[:60] if len(ast.dump(node.operand)) < 400 else ""
            return flat.but(less=flat.less | {flat.sym or name}, sym=f"neg({flat.sym or name})", const=MISSING)
        return flat.but(const=MISSING, sym="")

    def _plain(self, value: Value) -> Value:
        return Value(choices=value.choices, env=value.env)

    def _on_BoolOp(self, node: ast.BoolOp) -> Value:
        decisive = isinstance(node.op, ast.Or)
        found: list[Value] = []
        for each in node.values:
            value = self._perhaps(found, each)
            held = self.truth(value)
            if held is decisive:
                env = frozenset(name for one in (*found, value) for name in one.env)
                if not found or not decisive:
                    return value.but(env=env) if decisive or not found else Value(const=False, env=env)
                found.append(value)
                break
            if held is None or each is node.values[-1]:
                found.append(value)
        if not found:
            return NOTHING
        result = found[0]
        for value in found[1:]:
            result = join(result, value)
        if len(found) > 1:
            known = all(self.truth(each) is True for each in found)
            result = result.but(const=True) if known and not decisive and not result.refs else result
        return result

    def _perhaps(self, before: list[Value], node: ast.expr) -> Value:
        """A part of `a < b and model.load_state_dict(kept)`: done where what stands before it says so."""
        if not before or not any(isinstance(each, ast.Call) for each in nodes(node)):
            return self.evaluate(node)
        done: list[Value] = []

        def run() -> bool:
            done.append(self.evaluate(node))
            return True

        test = before[0] if len(before) == 1 else blend(*map(self.flat, before))
        self.branch(test, run, lambda: True, node)
        return done[0]

    def branch(self, test: Value, *branches_and_node: Any) -> bool:
        raise NotImplementedError

    def truth(self, value: Value) -> bool | None:
        """Whether a value counts as true; None where that is not known."""
        if value.const is not MISSING and not value.refs and value.items is None:
            try:
                return bool(value.const)
            except Exception:
                return None
        if value.items is not None and not value.refs:
            return bool(value.items)
        if value.flags & GRAD and value.toks:
            return None
        if value.refs and value.const is MISSING:
            kinds = {obj.kind for obj in value.refs}
            if kinds <= {"function", "class", "bound", "instance", "module", "foreign", "partial", "method"}:
                return True if not kinds & {"instance"} or not value.losses else None
            if kinds <= {"dict"} and any(obj.slots.get("#elem", NOTHING).flags for obj in value.refs):
                return True
        return None

    def _on_Compare(self, node: ast.Compare) -> Value:
        values = [self.evaluate(node.left), *(self.evaluate(each) for each in node.comparators)]
        texts = [node.left, *node.comparators]
        found: list[Value] = []
        for n, op in enumerate(node.ops):
            found.append(self.compare(op, values[n], values[n + 1], node, texts[n : n + 2]))
        if len(found) == 1:
            return found[0]
        held = [self.truth(each) for each in found]
        joined = blend(*found)
        if any(each is False for each in held):
            return Value(const=False, env=joined.env)
        return Value(const=True, env=joined.env) if all(held) else joined

    def _on_IfExp(self, node: ast.IfExp) -> Value:
        test = self.evaluate(node.test)
        held = None if _from_two_tables(node) else self.truth(test)
        if held is not None:
            value = self.evaluate(node.body if held else node.orelse)
            return (
                value.but(env=value.env | test.env, choices=value.choices | test.choices)
                if test.env or test.choices
                else value
            )
        one, two = self.evaluate(node.body), self.evaluate(node.orelse)
        result = join(one, two)
        asked = self.flat(test)
        if asked.raw and result.active and not result.losses:  # p if bit else 1 - p: the probability of that bit
            result = result.but(toks=blend(result, asked).toks)
        if test.choices:
            result = self._chosen_from(result, test.choices)
        if self.plain(result) and not result.sym and result.const is MISSING:
            result = result.but(sym=_canonical(node))
        return result

    # Containers.
    def _on_Tuple(self, node: ast.Tuple) -> Value:
        return Value(items=tuple(self._listed_items(node.elts)))

    def _listed_items(self, nodes: list[ast.expr]) -> list[Value]:
        items: list[Value] = []
        for each in nodes[:4096]:
            if isinstance(each, ast.Starred):
                elements = self.elements(self.evaluate(each.value), each)
                items += elements.exact if elements.exact is not None else [elements.any]
            else:
                items.append(self.evaluate(each))
        return items

    def _on_List(self, node: ast.List) -> Value:
        new = self.new("list", None, node)
        items = self._listed_items(node.elts)
        starred = any(isinstance(each, ast.Starred) for each in node.elts)
        options = not starred and len(items) <= SETTINGS and all(map(is_option, items))
        if (len(items) > 64 and not options) or (starred and len(items) > 24):
            for each in items[:256]:
                self.add_content(new, each, "#elem")
        else:
            new.slots["#items"] = Value(items=tuple(items))
            if starred and len(items) == len(node.elts):  # [0, *later]: one item stands for many
                new.slots["#open"] = 1
        return self.ref(new)

    def _on_Set(self, node: ast.Set) -> Value:
        items = self._listed_items(node.elts)
        if all(each.const is not MISSING for each in items):
            return Value(items=tuple(items))
        new = self.new("list", "set", node)
        new.slots["#items"] = Value(items=tuple(items))
        return self.ref(new)

    def _on_Dict(self, node: ast.Dict) -> Value:
        new = self.new("dict", None, node)
        for key, value in zip(node.keys[:2000], node.values, strict=False):
            held = self.evaluate(value)
            if key is None:
                self._update(new, held, node)
                continue
            name = self.evaluate(key)
            if name.const is not MISSING and hashable(name.const):
                new.slots[("k", name.const)] = held
            else:
                self.add_content(new, held, "#elem")
                self.add_content(new, name, "#keys")
        return self.ref(new)

    def _on_JoinedStr(self, node: ast.JoinedStr) -> Value:
        parts = [self.evaluate(each) for each in node.values]
        if all(isinstance(each.const, str) for each in parts):
            return Value(
                const="".join(str(each.const) for each in parts)[:20_000],
                env=blend(*parts).env if parts else frozenset(),
            )
        flats = []
        labels = [part.value if isinstance(part, ast.Constant) else "" for part in node.values]
        named = ["", *map(str, labels[:-1])]  # the text before each part
        scored = any(_SCORE.search(label) for label in named)
        for each, label in zip(parts, named, strict=True):
            flat = self.flat(each)
            if scored and _NAMED.search(label) and not _SCORE.search(label):  # `worst:` beside `val_bpb:` is no score
                flat = flat.but(losses=0, choices=0)
            flats.append(
                flat.but(words=(str(flat.const)[:200],), const=MISSING) if isinstance(flat.const, str) else flat
            )
        said = blend(*flats)
        return said.but(const=MISSING, refs=NO_OBJECTS, sym="", flags=said.flags | TEXT)

    def _on_FormattedValue(self, node: ast.FormattedValue) -> Value:
        value = self.spoken(self.evaluate(node.value), node)
        if isinstance(value.const, (str, int)) and not isinstance(value.const, bool) and node.format_spec is None:
            return Value(const=str(value.const), env=value.env)
        if value.const is not MISSING:
            return Value(words=(str(value.const)[:80],))
        flat = self.flat(value)
        number = (flat.losses or flat.toks) and not flat.flags & TEXT
        return flat.but(const=MISSING, words=() if number else flat.words)


_SCORE = re.compile(r"bpb|bpc|loss|nats|nll|ppl|perplex|score|bits", re.IGNORECASE)
_NAMED = re.compile(r"[A-Za-z]{3,}\W*$")


def _canonical(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text[:80] if len(text) < 200 else ""


def _from_two_tables(node: ast.IfExp) -> bool:
    """`a[n] if n in a else b[n]`: weights that lie in two tables, some here and some there."""
    test, arms = node.test, (node.body, node.orelse)
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.In):
        return False
    key = ast.dump(test.left)
    return all(isinstance(each, ast.Subscript) and ast.dump(each.slice) == key for each in arms)
