"""A training clock that is set back within the loop that it ends: what it had counted by then is in no 600 s."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

from fairway.audit.case import Case
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.verdict import Place

_CLOCKS = frozenset(("time", "perf_counter", "monotonic", "perf_counter_ns", "monotonic_ns", "time_ns", "elapsed_time"))
_OF_MANY = frozenset(("step", "forward", "update", "train", "run", "add", "append", "get", "close"))
_SHORT = 12  # statements of a helper
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def restarted(case: Case) -> Place | None:
    """Where a start of the time that has gone by, or the object that counts it, is made anew under a condition of the
    training loop and nothing kept what it had counted; or where it is moved on by time in which the model learned."""
    tree = case.body.tree
    clocks = {node.name for node in nodes(tree) if isinstance(node, ast.ClassDef) and any(map(_is_clock, nodes(node)))}
    teaching, forgetful, emptying = _teaching(tree), _forgetful(tree), _emptying(tree)
    given = (node for node in nodes(tree) if isinstance(node, ast.Assign) and _is_new(node.value, clocks))
    made = {ast.unparse(target) for node in given for target in node.targets}
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for function in (tree, *functions):
        own = list(_within(function.body)) if function is not None else []
        for loop in own:
            if not isinstance(loop, (ast.For, ast.While)) or not _learns(loop, teaching):
                continue
            inside = set(map(id, _within(loop.body)))
            outside = [each for each in own if id(each) not in inside and getattr(each, "lineno", 0) < loop.lineno]
            begun = {name for node in outside for name in _started(node, clocks)}
            asked = {call for node in outside if (call := _begun_by(node, forgetful))}
            found = [*_set_back(loop, begun, clocks, teaching, made), *_begun_anew(loop, asked, forgetful, functions)]
            found += [*_begun_anew(loop, made | begun, emptying, ()), *_lessened(loop)]
            if found:
                return case.place(found[0])
    return None


def learning_loops(tree: ast.AST | None) -> list[ast.For | ast.While]:
    """The loops that take gradients, themselves or by a function of the script."""
    teaching = _teaching(tree)
    return [node for node in nodes(tree) if isinstance(node, (ast.For, ast.While)) and _learns(node, teaching)]


def looks(tree: ast.AST | None) -> int:
    """How often the clock is looked at, by itself or by a short helper, where the model learns: in the loops and
    functions that take gradients, and not under a condition that takes none."""
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    teaching = _teaching(tree)
    asking = {*_CLOCKS, *(node.name for node in _helpers(functions))}
    loops = (node for node in nodes(tree) if isinstance(node, (ast.For, ast.While)))
    taught = [node for node in functions if node.name in teaching]
    wide = teaching | {node.name for node in functions if _learns(node, teaching)}  # step() of forward_backward()
    bodies = [node.body for node in loops if _learns(node, wide)]
    inner = [each for body in bodies for statement in body for each in nodes(statement)]
    looped, called = {id(each) for each in inner}, {_called(each) for each in inner}
    bodies += [
        node.body for node in taught if node.name in called or not any(id(each) in looped for each in nodes(node))
    ]
    asked = {id(each) for body in bodies for each in _always(body, teaching, asking) if _asks(each, asking)}
    managers = {id(item.context_expr) for node in nodes(tree) if isinstance(node, ast.With) for item in node.items}
    return len(asked) + len(asked & managers)  # a block has two ends


def _teaching(tree: ast.AST | None) -> set[str]:
    """Names of functions that take a gradient, and of objects that do when they are called."""
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = {node.name for node in functions if _learns(node, ())}
    kinds = {
        kind.name
        for kind in nodes(tree)
        if isinstance(kind, ast.ClassDef)
        and any(getattr(each, "name", "") == "__call__" and _learns(each, found) for each in kind.body)
    }
    for node in nodes(tree):
        made = node.value if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) else None
        if made is not None and getattr(made.func, "id", "") in kinds and isinstance(node, ast.Assign):
            found |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return found


def held(tree: ast.AST | None, line: int) -> bool:
    """Whether the loop at a line, or the call at it of what has the loop, stands between two calls of what looks at the
    clock, `clock.hold()` before it and `clock.go()` after it."""
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    asking = {node.name for node in _helpers(functions)}
    for node in nodes(tree):
        body = getattr(node, "body", None)
        block: list[ast.stmt] = body if isinstance(body, list) else []
        for number, statement in enumerate(block):
            if statement.lineno == line and isinstance(statement, (ast.For, ast.While, ast.Expr, ast.Assign)):
                before, after = (_switched(part, asking) for part in (block[:number], block[number + 1 :]))
                return bool(before and after) and before[-1][0] == after[0][0] and before[-1][1] != after[0][1]
    return False


def _switched(block: list[ast.stmt], asking: set[str]) -> list[tuple[str, str]]:
    """What is called of an object, for nothing that it gives, and looks at the clock."""
    calls = (each.value for each in block if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call))
    methods = (call.func for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in asking)
    return [(ast.unparse(method.value), method.attr) for method in methods]


def milestones(tree: ast.AST | None) -> Iterator[tuple[ast.expr, int]]:
    """What is compared in a condition under which something that the clock is counted in is set, with the line of that:
    `if step == args.settled: clock.spent = 0.0`."""
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    looked = [*_helpers(functions), *(each for each in nodes(tree) if isinstance(each, (ast.Assign, ast.AugAssign)))]
    counted = {
        name
        for each in looked
        if any(map(_is_clock, nodes(each)))
        for part in nodes(each)
        for name in (getattr(part, "attr", ""), getattr(part, "id", ""))
        if name and isinstance(getattr(part, "ctx", None), (ast.Store, ast.Load))
    }
    for node in nodes(tree):
        line = next((each.lineno for each in node.body if _sets(each, counted)), 0) if isinstance(node, ast.If) else 0
        for test in nodes(node.test) if isinstance(node, ast.If) and line else ():
            if isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Eq, ast.GtE, ast.Gt)):
                yield from ((side, line) for side in (test.left, test.comparators[0]))


def _sets(statement: ast.stmt, counted: Collection[str]) -> bool:
    """Whether a statement gives something of these names another value: `spent, begun = 0.0, time.time()`."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    each_of = (part for each in targets for part in (_parts(each) if isinstance(each, ast.expr) else [each]))
    return any(getattr(each, "attr", getattr(each, "id", "")) in counted for each in each_of)


def short_helpers(tree: ast.AST | None) -> list[range]:
    """The lines of the short functions that look at the clock for others."""
    functions = [node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [range(node.lineno, (node.end_lineno or node.lineno) + 1) for node in _helpers(functions)]


def _helpers(functions: list[_Function]) -> list[_Function]:
    """Short functions that learn nothing and look at the clock, themselves or by another one."""
    sizes = {id(node): sum(isinstance(each, ast.stmt) for each in nodes(node)) for node in functions}
    short = [node for node in functions if sizes[id(node)] <= _SHORT and not _learns(node, ())]
    asking: set[str] = set(_CLOCKS)
    found = short
    for _ in range(2):
        found = [node for node in short if any(_asks(each, asking) for each in nodes(node))]
        asking |= {node.name for node in found}
    return found


def _always(body: list[ast.stmt], teaching: Collection[str], asking: Collection[str]) -> Iterator[ast.AST]:
    """What is worked out below some statements in every turn, or where something learns; and what does nothing but ask
    the clock, `if running: clock.stop()`, and sets numbers, `clock.spent = 0.0`."""
    for statement in body:
        if isinstance(statement, ast.If) and not _learns(statement, teaching):
            done = [each for each in statement.body if not (isinstance(each, ast.Expr) and _waits(each.value))]
            asks = [any(_asks(part, asking) for part in nodes(each)) for each in done]
            sets = [isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant) for each in done]
            alone = any(asks) and all(one or other for one, other in zip(asks, sets, strict=True))
            yield from nodes(statement if alone else statement.test)
        elif isinstance(statement, (ast.If, ast.With, ast.Try)):
            heads = statement.items if isinstance(statement, ast.With) else []
            yield from (each for head in heads for each in nodes(head))
            yield from _always([*statement.body, *getattr(statement, "orelse", [])], teaching, asking)
        elif not isinstance(statement, (ast.For, ast.While, *_FUNCTIONS)):
            yield from nodes(statement)


def _waits(node: ast.AST) -> bool:
    """torch.cuda.synchronize(), dist.barrier()"""
    return _called(node) in ("synchronize", "barrier")


def _asks(node: ast.AST, asking: Collection[str]) -> bool:
    """Whether a node calls something of one of these names."""
    return _called(node) in asking


def _called(node: ast.AST) -> str:
    return last_name(node.func) if isinstance(node, ast.Call) else ""


def _set_back(
    loop: ast.For | ast.While, begun: set[str], clocks: set[str], teaching: set[str], made: set[str]
) -> Iterator[int]:
    """Lines of a loop that set back what was begun before it, where nothing before them in their block reads that, or
    what it is counted into. made: the names under which there are objects that count time."""
    counted = {name for node in nodes(loop) for name in _counted(node, begun)}
    for block in _blocks(loop):
        for number, statement in enumerate(block):
            before = block[:number]
            again = _started(statement, clocks) & begun if block is not loop.body else set()
            if again and not any(_names(each) & again or _said(each) & counted for each in _keeping(before)):
                yield statement.lineno
            elif again and (look := _without_sums(loop, block, before, again)):
                yield look
            field = _replaced(statement, clocks) if block is not loop.body else ""
            if field and not any(field in ast.unparse(each) for each in _keeping(before)):
                yield statement.lineno
            owner = _given_the_time(statement) if block is not loop.body else ""
            if owner in made and not any(owner in _names(each) for each in _keeping(before)):
                yield statement.lineno
            nought = _to_nought(statement, begun | made) if block is not loop.body else ""
            if nought and not any(nought in ast.unparse(each) for each in _keeping(before)):
                yield statement.lineno
            if (
                isinstance(statement, ast.AugAssign)
                and isinstance(statement.op, ast.Add)
                and _names(statement.target) & begun
            ):
                since = {name for part in nodes(statement.value) for name in _difference(part)}
                above = [each for each in loop.body if each.lineno < statement.lineno]
                from_there = [n for n, each in enumerate(above) if _started(each, clocks) & since]
                if from_there and any(_learns(each, teaching) for each in above[from_there[-1] :]):
                    yield statement.lineno


def _lessened(loop: ast.For | ast.While) -> Iterator[int]:
    """Lines that make a sum of times smaller by a number: `spent *= 0.9`, `spent -= 5.0`, `spent = 0.9 * spent`."""
    added = [each for each in nodes(loop) if isinstance(each, ast.AugAssign) and isinstance(each.op, ast.Add)]
    sums = {ast.unparse(each.target) for each in added if any(map(_is_clock, nodes(each.value)))}
    for node in nodes(loop):
        if isinstance(node, ast.AugAssign):
            name, by, sides = ast.unparse(node.target), node.op, [node.value]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            name, by, sides = ast.unparse(node.targets[0]), node.value.op, [node.value.left, node.value.right]
            if name not in map(ast.unparse, sides):
                continue
        else:
            continue
        values = [each.value for each in sides if isinstance(each, ast.Constant)]
        numbers = [each for each in values if isinstance(each, (int, float)) and not isinstance(each, bool)]
        less = any((isinstance(by, ast.Mult) and n < 1) or (isinstance(by, ast.Sub) and n > 0) for n in numbers)
        if less and name in sums:
            yield node.lineno


def _without_sums(loop: ast.For | ast.While, block: list[ast.stmt], before: list[ast.stmt], again: set[str]) -> int:
    """The first look at the time since a start that is set back in a block, of a loop in which no look adds what the
    block had summed by then, `spent += time() - t0`; 0 where one does, or nothing is summed in a name."""
    sums = {
        each.target.id
        for each in before
        if isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name) and _names(each.value) & again
    }
    inside = {id(part) for each in block for part in nodes(each)}
    given = (node for node in nodes(loop) if isinstance(node, ast.Assign) and id(node) not in inside)
    looked = [node for node in given if any(map(_is_clock, nodes(node.value))) and _names(node.value) & again]
    kept = (node for node in nodes(loop) if isinstance(node, ast.Assign | ast.Compare) and id(node) not in inside)
    if not sums or not looked or any(_names(node) & sums for node in kept):
        return 0
    return looked[-1].lineno


def _keeping(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that may keep what a clock has counted: not a message, `log(f"{clock.seconds():.1f} s")`,
    `log.info("%.1f s", clock.seconds())`."""
    for each in block:
        call = each.value if isinstance(each, ast.Expr) else None
        said = call.args if isinstance(call, ast.Call) else []
        if not any(isinstance(arg, ast.JoinedStr) or isinstance(getattr(arg, "value", None), str) for arg in said):
            yield each


def _replaced(statement: ast.stmt, clocks: set[str]) -> str:
    """The field that is given a new object that counts time in the place of the one that has counted; "" of all
    else."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Attribute):
        return ""
    return ast.unparse(statement.targets[0]) if _is_new(statement.value, clocks) else ""


def _is_new(value: ast.expr, clocks: set[str]) -> bool:
    """Stopwatch(), Stopwatch().go(): an object of a class that asks for the time."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        value = value.func.value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in clocks


def _emptying(tree: ast.AST | None) -> set[str]:
    """Methods of a class that counts time that set to nought what it adds up: `self.total, self.since = 0.0, now()`."""
    found = set()
    for kind in nodes(tree):
        if not isinstance(kind, ast.ClassDef) or not any(map(_is_clock, nodes(kind))):
            continue
        summed = {
            ast.unparse(each.target)
            for each in nodes(kind)
            if isinstance(each, ast.AugAssign) and any(map(_is_clock, nodes(each.value)))
        }
        for method in kind.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                given = (each for each in nodes(method) if isinstance(each, ast.Assign))
                pairs = [
                    pair for each in given for pair in zip(_parts(each.targets[0]), _parts(each.value), strict=False)
                ]
                noughts = {
                    ast.unparse(field) for field, value in pairs if isinstance(value, ast.Constant) and value.value == 0
                }
                found |= {method.name} if noughts & summed else set()
    return found


def _forgetful(tree: ast.AST | None) -> set[str]:
    """Methods that begin a clock of a class that knows nothing but when it began: `def start(self): self.t0 = time()`,
    where nothing is ever added to what it says."""
    found = set()
    for kind in nodes(tree):
        parts = list(nodes(kind)) if isinstance(kind, ast.ClassDef) else []
        begun = {
            ast.unparse(part.targets[0]) for part in parts if isinstance(part, ast.Assign) and _is_clock(part.value)
        }
        sums = [part for part in parts if isinstance(part, (ast.BinOp, ast.AugAssign)) and isinstance(part.op, ast.Add)]
        fields = {ast.unparse(part) for part in parts if isinstance(part, ast.Attribute)} & begun
        if len(fields) == 1 and not any(isinstance(one, ast.AugAssign) or fields & _said(one) for one in sums):
            found |= {
                each.name
                for each in parts
                if isinstance(each, ast.FunctionDef) and not each.name.startswith("__")
                if any(isinstance(part, ast.Assign) and _is_clock(part.value) for part in each.body)
            }
    return found


def _begun_by(node: ast.AST, forgetful: set[str]) -> str:
    """The object, of `self.clock.start()`, where that begins its clock anew; "" of all else."""
    call = node.value if isinstance(node, ast.Expr) else None
    method = call.func if isinstance(call, ast.Call) and not call.args else None
    return ast.unparse(method.value) if isinstance(method, ast.Attribute) and method.attr in forgetful else ""


def _begun_anew(
    loop: ast.For | ast.While, asked: set[str], forgetful: set[str], helpers: Sequence[_Function]
) -> Iterator[int]:
    """Lines under a condition of a loop that begin a clock anew that was begun before it, where nothing before them in
    their block reads it; and lines of helpers that are called there and are handed the clock."""
    for block in _blocks(loop):
        for number, statement in enumerate(block if block is not loop.body else ()):
            clock = _begun_by(statement, forgetful)
            if clock in asked and not any(clock in ast.unparse(each) for each in _keeping(block[:number])):
                yield statement.lineno
            helper, names = _handed(statement, helpers)
            for n, inner in enumerate(helper.body if helper is not None else ()):
                own = _begun_by(inner, forgetful)
                if names.get(own) in asked and not any(own in _names(each) for each in _reading(helper, n, own)):
                    yield inner.lineno


def _handed(statement: ast.stmt, helpers: Sequence[_Function]) -> tuple[_Function | None, dict[str, str]]:
    """The helper that a statement calls for nothing that it gives, and what its parameters are there."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None, {}
    name = call.func.id
    helper = next((each for each in helpers if each.name == name), None)
    if helper is None:
        return None, {}
    given = dict(zip((each.arg for each in helper.args.args), map(ast.unparse, call.args), strict=False))
    return helper, given | {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg is not None}


def _reading(helper: _Function | None, number: int, clock: str) -> Iterator[ast.stmt]:
    """The statements before one that may keep what a clock has counted: not `clock.pause()`, where it forgets that."""
    for each in _keeping(helper.body[:number] if helper is not None else []):
        call = each.value if isinstance(each, ast.Expr) else None
        method = call.func if isinstance(call, ast.Call) else None
        if not (isinstance(method, ast.Attribute) and ast.unparse(method.value) == clock):
            yield each


def _given_the_time(statement: ast.stmt) -> str:
    """clock, of `clock.t0 = time.perf_counter()`; "" of all else."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Attribute):
        return ""
    return _owner(statement.targets[0]) if _is_clock(statement.value) else ""


def _to_nought(statement: ast.stmt, clocks: set[str]) -> str:
    """What a statement sets to nought of an object that counts time, `clock.spent = 0.0`, `clock.total["train"],
    clock.since["train"] = 0.0, clock.now()`; "" where it sets none."""
    if not isinstance(statement, ast.Assign):
        return ""
    for target in statement.targets:
        for field, value in zip(_parts(target), _parts(statement.value), strict=False):
            nought = isinstance(value, ast.Constant) and type(value.value) in (int, float) and not value.value
            if nought and isinstance(field, ast.Attribute | ast.Subscript) and _owner(field) in clocks:
                return ast.unparse(field)
    return ""


def _owner(node: ast.expr) -> str:
    """clock, of clock.total["train"]"""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _within(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes below some statements, in their order; not those of functions and classes that are defined there."""
    waiting: list[ast.AST] = [*reversed(body)]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _FUNCTIONS):
            waiting += [*ast.iter_child_nodes(node)][::-1]


def _blocks(loop: ast.For | ast.While) -> Iterator[list[ast.stmt]]:
    """The loop's own block, and those of its conditions; none in which weights are put back: what was learned by then
    is gone, and its time with it."""
    yield loop.body
    for node in _within(loop.body):
        if isinstance(node, ast.If):
            both = (node.body, node.orelse)
            yield from (block for block in both if not any(_puts_back(part) for each in block for part in nodes(each)))


def _puts_back(node: ast.AST) -> bool:
    return _called(node) == "load_state_dict"


def _learns(node: ast.AST, teaching: Collection[str]) -> bool:
    """Whether a gradient is taken below a node, or something is called that takes one, `trainer.accumulate()`. Of
    another object's method by a name that many have, `optimizer.step()`, nobody knows."""

    def takes(each: ast.AST) -> bool:
        if not isinstance(each, ast.Attribute):
            return getattr(each, "id", None) in teaching
        own = isinstance(each.value, ast.Name) and (each.value.id == "self" or each.attr not in _OF_MANY)
        taken = each.attr == "grad" and last_name(each.value) == "autograd"  # torch.autograd.grad(loss, weights)
        return (own and each.attr in teaching) or each.attr == "backward" or taken

    return any(takes(each) for each in nodes(node))


def _is_clock(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in _CLOCKS


def _started(node: ast.AST, clocks: set[str]) -> set[str]:
    """The names that are given the time, or an object of a class that asks for it: `start, done = time(), False`."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return set()
    target, value = node.targets[0], node.value
    pairs = zip(_parts(target), _parts(value), strict=False)
    return {name.id for name, given in pairs if isinstance(name, ast.Name) and _begins(given, clocks)}


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _begins(value: ast.expr, clocks: set[str]) -> bool:
    return _is_new(value, clocks) or _is_clock(value)


def _difference(node: ast.AST) -> set[str]:
    """start, of time() - start."""
    taken = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and _is_clock(node.left)
    return _names(node.right) if taken and isinstance(node, ast.BinOp) else set()


def _counted(node: ast.AST, begun: set[str]) -> set[str]:
    """total, of total + (time() - start), of total += time() - start."""
    if not isinstance(node, (ast.BinOp, ast.AugAssign)) or not isinstance(node.op, ast.Add):
        return set()
    sides = (node.target, node.value) if isinstance(node, ast.AugAssign) else (node.left, node.right)
    timed = [side for side in sides if any(_difference(part) & begun for part in nodes(side))]
    return {name for side in sides if timed and side not in timed for name in _said(side)}


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in nodes(node) if isinstance(each, ast.Name)}


def _said(node: ast.AST) -> set[str]:
    """Names, and fields with what has them, `self.elapsed`: the object alone is no such field."""
    whole = [each for each in nodes(node) if isinstance(each, (ast.Name, ast.Attribute))]
    owners = {id(each.value) for each in whole if isinstance(each, ast.Attribute)}
    return {ast.unparse(each) for each in whole if id(each) not in owners}


__all__ = ["held", "looks", "milestones", "restarted", "short_helpers"]
