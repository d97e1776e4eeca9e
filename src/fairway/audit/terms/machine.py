"""Reads a script as the machine would run it, without running it: every value becomes a term.

Functions and methods are entered where they are called; a branch is taken where its condition is known, else both are,
and the names become choices; a loop's body is read twice, so that what one round leaves reaches the next. Bounded: in
steps, in depth, in recursion and in the effort spent on any one function; beyond that a call stays an opaque term.
"""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairway.audit.reading.script import Layer
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import UNKNOWN, Settings, truth
from fairway.audit.terms import assigning, calls, carried, elements, expressions, objects, paths, patterns
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Class, Coroutine, Event, Frame, Function, constant

STEPS = 400_000  # expressions read in all: about 2 s
OWN_STEPS = 30_000  # expressions of any one function: a model's forward is read often enough by then
DEPTH = 14  # calls within calls
_HANDLERS = 8
_NAMES = 12  # of a tuple that is assigned to


@dataclass(frozen=True)
class Module:
    """A script's text: how it is imported (its stem), its path, its tree."""

    name: str
    path: str
    tree: ast.Module


class Machine:
    """Reads one program. After `run`: events in order, options of its argument parsers, what was cut short."""

    def __init__(
        self,
        entry: Module,
        others: Iterable[Module],
        settings: Settings,
        layers: Mapping[tuple[str, int], Layer] | None = None,
    ) -> None:
        self.entry = entry
        self.others = {module.name: module for module in others}
        self.settings = settings
        self.layers = layers or {}
        self.executed: set[str] = set()
        self.coroutines: dict[int, tuple[Term, Coroutine]] = {}  # by the list that stands for what they yield
        self.defined: dict[int, tuple[ast.AST, Function]] = {}  # by the node that defines them
        self.commands: dict[int, tuple[Term, list[Term]]] = {}  # of command lines, by the application
        self.holders: dict[int, tuple[Term, Term]] = {}  # objects that are containers, by what lies in them
        self.augmented: dict[int, Term] = {}  # sums that a tensor was made in place
        self.items: dict[tuple[int, Any], tuple[Term, Term]] = {}
        self.elements: dict[tuple[int, str, int], tuple[Term, Term]] = {}  # with its term, which keeps the id
        self.events: list[Event] = []
        self.clocks: list[Event] = []
        self.options: dict[str, Term] = {}
        self.conditions: list[Term] = []
        self.path: list[str] = []
        self.active: list[ast.AST] = []
        self.loops = 0
        self.rounds = 0
        self.marks: list[int] = []  # loops that held when each of the calls in `path` was entered
        self.steps = 0
        self.own_steps: dict[int, int] = {}
        self.cut: list[str] = []  # functions that were not entered any more
        self.modules: dict[str, Frame] = {}
        self.handlers: list[Term] = []  # of a log: what each of them does is done at every line that is said
        self.statement: ast.expr | None = None  # the expression whose value is thrown away

    def run(self) -> "Machine":
        """Reads the entry's text; a text that only defines things has its functions read with unknown arguments."""
        frame = self.load(self.entry, "__main__")
        if not self.path and not any(event.path for event in self.events):
            for term in list(frame.vars.values()):
                if term.op == "function" and term.file == self.entry.path:
                    calls.enter(self, term.value, [], {}, term)
        for handler in self.handlers[:_HANDLERS]:
            record = Term("free", (), "record", handler.file, handler.line)
            calls.method(self, handler, "emit", [record], handler.file, handler.line)
        return self

    def load(self, module: Module, name: str) -> Frame:
        frame = Frame(module.path, depth=len(self.conditions))
        self.modules[module.name] = frame
        frame.vars["__name__"] = constant(name)
        frame.vars["__file__"] = Term("free", (), "__file__", module.path)
        self.block(module.tree.body, frame)
        return frame

    def execute(self, file: str, line: int, frame: Frame) -> None:
        """The text that an exec (or a start of another program) of this line executes, read in its place."""
        layer = self.layers.get((file, line))
        if layer is None or layer.script.tree is None or layer.script.path in self.executed:
            return
        self.executed.add(layer.script.path)
        home = frame.module
        inside = Frame(layer.script.path, vars=home.vars if layer.how == "exec" else {}, depth=len(self.conditions))
        inside.vars["__name__"] = constant("__main__")
        self.block(layer.script.tree.body, inside)
        if layer.how == "exec":
            home.vars = inside.vars

    # ---- statements: each answers whether the path ends there

    def block(self, statements: Sequence[ast.stmt], frame: Frame) -> bool:
        for statement in statements:
            if self.steps > STEPS:
                return False
            handler: Callable[[ast.stmt, Frame], bool | None] | None
            handler = getattr(self, "on_" + type(statement).__name__, None)
            if handler is not None and handler(statement, frame):
                return True
        return False

    def value(self, node: ast.expr | None, frame: Frame) -> Term:
        return expressions.value(self, node, frame)

    def on_Expr(self, node: ast.Expr, frame: Frame) -> None:
        self.statement = node.value
        self.value(node.value, frame)

    def on_Assign(self, node: ast.Assign, frame: Frame) -> None:
        term = self.value(node.value, frame)
        if isinstance(node.targets[0], ast.Tuple) and term.op == "list" and term.value == "comp":
            term = self.made_anew(term, node, len(node.targets[0].elts), frame)
        for target in node.targets:
            assigning.assign(self, target, term, frame)

    def made_anew(self, term: Term, node: ast.Assign, names: int, frame: Frame) -> Term:
        """a, b = (Table() for _ in range(2)): each name has an object of its own."""
        if not isinstance(node.value, (ast.GeneratorExp, ast.ListComp)) or term.parts[0].op != "object":
            return term
        more = (self.value(node.value, frame).parts[0] for _ in range(min(names, _NAMES) - 1))
        return Term("tuple", (term.parts[0], *more), None, frame.file, node.lineno)

    def on_AnnAssign(self, node: ast.AnnAssign, frame: Frame) -> None:
        if node.value is not None:
            assigning.assign(self, node.target, self.value(node.value, frame), frame)

    def on_AugAssign(self, node: ast.AugAssign, frame: Frame) -> None:
        before = self.value(node.target, frame)
        added = self.value(node.value, frame)
        term = expressions.operation(self, node.op, before, added, frame.file, node.lineno, in_place=True)
        if isinstance(node.target, ast.Name) and term.op == "op" and calls.is_array(before):
            self.augmented[id(term)] = term
        assigning.assign(self, node.target, term, frame)

    def on_Return(self, node: ast.Return, frame: Frame) -> bool:
        frame.returns.append((self.conjunction(frame.depth), self.value(node.value, frame)))
        return True

    def on_Raise(self, node: ast.Raise, frame: Frame) -> bool:
        if node.exc is not None:
            self.value(node.exc, frame)
        return True

    def on_Assert(self, node: ast.Assert, frame: Frame) -> None:
        self.value(node.test, frame)

    def on_Continue(self, node: ast.Continue, frame: Frame) -> bool:
        if frame.loops:
            frame.loops[-1].continued.append((self.conjunction(frame.loops[-1].depth), dict(frame.vars)))
        return True

    def on_Break(self, node: ast.Break, frame: Frame) -> bool:
        if frame.loops:
            frame.loops[-1].broken.append((self.conjunction(frame.loops[-1].depth), dict(frame.vars)))
        return True

    def on_Global(self, node: ast.Global, frame: Frame) -> None:
        frame.elsewhere.update(dict.fromkeys(node.names, frame.module))

    def on_Nonlocal(self, node: ast.Nonlocal, frame: Frame) -> None:
        for name in node.names:
            outer = frame.outer
            while outer is not None and name not in outer.vars:
                outer = outer.outer
            if outer is not None:
                frame.elsewhere[name] = outer

    def on_Import(self, node: ast.Import, frame: Frame) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.split(".")[0]
            own = self.own_module(name)
            term = Term("namespace", (), own, frame.file, node.lineno) if own else None
            frame.vars[alias.asname or name] = term or Term("name", (), name, frame.file, node.lineno)

    def on_ImportFrom(self, node: ast.ImportFrom, frame: Frame) -> None:
        own = self.own_module(node.module or "")
        for alias in node.names:
            if own is not None and alias.name == "*":
                frame.vars.update({name: term for name, term in own.vars.items() if not name.startswith("__")})
            elif own is not None and alias.name in own.vars:
                frame.vars[alias.asname or alias.name] = own.vars[alias.name]
            else:
                nested = self.own_module(alias.name) if not node.module else None
                frame.vars[alias.asname or alias.name] = (
                    Term("namespace", (), nested, frame.file, node.lineno)
                    if nested
                    else Term("name", (), f"{node.module}.{alias.name}", frame.file, node.lineno)
                )

    def own_module(self, name: str) -> Frame | None:
        """A neighbouring script of this name, read at its first import."""
        stem = name.rsplit(".", 1)[-1]
        if stem in self.modules:
            return self.modules[stem]
        module = self.others.get(stem)
        return self.load(module, stem) if module is not None and name in (stem, module.name) else None

    def on_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, frame: Frame) -> None:
        term = expressions.function(self, node, frame)
        self.defined[id(node)] = (node, term.value)
        if any(isinstance(one, ast.Attribute) and one.attr in ("setter", "deleter") for one in node.decorator_list):
            return  # the name stays that of the property
        frame.vars[node.name] = self.decorated(node, term, frame)

    def decorated(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, term: Term, frame: Frame) -> Term:
        """A function or class as its decorators leave it; those that are not the script's own leave it as it is."""
        for one in reversed(node.decorator_list):
            if isinstance(one, ast.Call) and ast.unparse(one.func).endswith("wraps"):
                continue  # it gives the wrapper a name
            decorator = self.value(one, frame)
            if decorator.op in ("function", "bound", "class", "object"):
                here = calls.Here(None, frame, None, False, node.lineno)
                made = calls.dispatch(self, decorator, [term], {}, here)
                term = made if made.op in ("function", "bound", "class", "object") else term
            elif (
                decorator.op == "call"
                and decorator.called in ("command", "callback")
                and decorator.receiver is not None
            ):
                self.commands.setdefault(id(decorator.receiver), (decorator.receiver, []))[1].append(term)
        return term

    on_AsyncFunctionDef = on_FunctionDef

    def on_ClassDef(self, node: ast.ClassDef, frame: Frame) -> None:
        inside = Frame(frame.file, outer=frame, depth=len(self.conditions))
        bases = [self.value(base, frame) for base in node.bases]
        self.block(node.body, inside)
        fields = tuple(
            s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        )
        own = tuple(base.value for base in bases if base.op == "class")
        plain = [base.parts[0] if base.op == "item" else base for base in bases]  # dict[str, int]: dict
        outside = tuple(str(base.value) for base in plain if base.op == "name")
        made = Class(node.name, inside.vars, own, outside, fields)
        for statement in nodes(ast.Module(node.body, [])):
            _, function = self.defined.get(id(statement), (None, None))
            if function is not None and function.frame is inside:
                function.owner, function.frame = made, frame
        for term in inside.vars.values():  # lambdas, and functions that were made elsewhere
            if term.op == "function" and term.value.owner is None:
                term.value.owner = made
                term.value.frame = frame if term.value.frame is inside else term.value.frame
        frame.vars[node.name] = self.decorated(node, Term("class", (), made, frame.file, node.lineno), frame)

    def on_With(self, node: ast.With | ast.AsyncWith, frame: Frame) -> bool:
        held: list[Term] = []
        for item in node.items:
            term = self.value(item.context_expr, frame)
            held.append(term)
            bound = objects.entered(self, term, frame.file, node.lineno)
            if term.op == "list" and term.value == "comp":  # a generator that serves as a context
                bound = elements.element(self, term, frame.file, node.lineno)
            if item.optional_vars is not None:
                assigning.assign(self, item.optional_vars, bound, frame)
        ended = self.block(node.body, frame)
        for term in held[::-1]:
            objects.left(self, term, frame.file, node.lineno)
        return ended

    on_AsyncWith = on_With

    def on_If(self, node: ast.If, frame: Frame) -> bool:
        test = self.value(node.test, frame)
        held = self.holds(test)
        if held is not None:
            return self.block(node.body if held else node.orelse, frame)
        return paths.fork(
            self, test, lambda: self.block(node.body, frame), lambda: self.block(node.orelse, frame), frame
        )

    def on_Try(self, node: ast.Try, frame: Frame) -> bool:
        ended = self.block(node.body, frame) or self.block(node.orelse, frame)
        for handler in node.handlers:
            failed = Term("free", (), "exception", frame.file, handler.lineno)
            if handler.name:
                frame.vars[handler.name] = failed

            def handled(body: list[ast.stmt] = handler.body) -> bool:
                return self.block(body, frame)

            ended = paths.fork(self, failed, handled, lambda ended=ended: ended, frame)  # type: ignore[misc]
        return self.block(node.finalbody, frame) or ended

    on_TryStar = on_Try

    def on_For(self, node: ast.For | ast.AsyncFor, frame: Frame) -> bool:
        term = self.value(node.iter, frame)
        few = () if term.op == "list" and term.value == "none" else elements.spelt_items(term)
        if few is not None and not node.orelse:
            return paths.unrolled(self, node, few, frame)
        element = elements.element(self, term, frame.file, node.lineno)

        def begin() -> None:
            self.rounds += 1
            assigning.assign(self, node.target, elements.fresh(element, self.rounds), frame)

        return paths.loop(self, carried.body_of(node), node.orelse, frame, begin)

    on_AsyncFor = on_For

    def on_While(self, node: ast.While, frame: Frame) -> bool:
        if self.holds(self.value(node.test, frame)) is False:
            return self.block(node.orelse, frame)
        return paths.loop(self, node.body, node.orelse, frame, lambda: self.value(node.test, frame))

    def on_Match(self, node: ast.Match, frame: Frame) -> bool:
        return patterns.match(self, self.value(node.subject, frame), node.cases, frame)

    def on_Delete(self, node: ast.Delete, frame: Frame) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                frame.vars.pop(target.id, None)

    # ---- paths

    def holds(self, test: Term) -> bool | None:
        if test.op == "const":
            return truth(test.value)
        if objects.held(test) is not None:
            return None
        if test.op in ("object", "function", "class", "bound", "namespace"):
            return True
        if test.op in ("list", "tuple", "set", "dict") and test.value != "comp":
            return len(test.parts) > 0 or None  # an empty list may have been filled through another name
        return None

    def conjunction(self, depth: int) -> Term | None:
        """The undecided conditions since `depth` as one; None where there are none."""
        since = self.conditions[depth:]
        if len(since) < 2:
            return since[0] if since else None
        return Term("op", tuple(since), "and", since[-1].file, since[-1].line)

    def record(self, term: Term) -> None:
        here = (tuple(self.conditions), tuple(self.path), self.loops, len(self.events), self.within())
        self.events.append(Event(term, *here))

    def clock(self, term: Term) -> None:
        """A comparison with the time that has gone by."""
        here = (tuple(self.conditions), tuple(self.path), self.loops, len(self.events), self.within())
        self.clocks.append(Event(term, *here))

    def within(self) -> int:
        """How far down the calls the innermost loop stands."""
        return next((i for i in range(len(self.marks), 0, -1) if self.marks[i - 1] < self.loops), 0)

    def may_enter(self, function: Function) -> bool:
        """Whether a call is followed: not too deep, within itself once, effort left for this function and in all."""
        node = function.node
        within = self.active.count(node)
        if len(self.active) >= DEPTH or within > 1 or self.steps > STEPS:
            return False
        if self.own_steps.get(id(node), 0) > (OWN_STEPS // 8 if within else OWN_STEPS):
            self.cut.append(function.name)
            return False
        return True

    def environ(self, name: Term, default: Term, file: str, line: int) -> Term:
        """An environment variable's value: what the run command says, else the default."""
        said = self.settings.environ(name.value, UNKNOWN) if name.op == "const" else UNKNOWN
        if said is not UNKNOWN:
            return Term("const", (default,), said, file, line)
        told = name.op == "const" and name.value in self.settings.environment
        rank = name.op == "const" and self.settings.environ(name.value, None) is UNKNOWN
        if default.op == "const" and not told and not rank:
            return Term("const", (default,), default.value, file, line)
        return Term("env", (default,), name.value if name.op == "const" else None, file, line)
