"""The count of documents at which a script that writes shards goes over from validation to training, as written."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fairway.audit.reading.tree import last_name, nodes

FEWEST = 500  # below it a number is no count of held-out documents
MOST = 1_000_000


@dataclass(frozen=True)
class Split:
    """The count, where it is written, and what it is called: a name, a field, a key."""

    count: int
    line: int
    name: str


def splits(tree: ast.Module) -> list[Split]:
    """Of every condition on a counter of documents that turns to training text: `if n == held: split = "train"`,
    `val if n < held else train`; or that passes over the first ones where only training text is written: `if n < held:
    continue`, `if n >= held: yield document`."""
    given, handed = _given(tree), _handed(tree)
    if not _tokenises(tree):
        return []
    found = []
    for loop in nodes(tree):
        counters = _counters(loop) if isinstance(loop, (ast.For, ast.While)) else set()
        for node in nodes(loop) if counters else ():
            if not isinstance(node, (ast.If, ast.IfExp)):
                continue
            for compared in (each for each in nodes(node.test) if isinstance(each, ast.Compare)):
                sides = [compared.left, *compared.comparators]
                if len(sides) != 2 or not any(isinstance(side, ast.Name) and side.id in counters for side in sides):
                    continue
                other = sides[1] if isinstance(sides[0], ast.Name) and sides[0].id in counters else sides[0]
                other = handed.get(_called(other), other)  # of a parameter what the only call hands over
                name = _called(other)
                number = _number(other, given)
                turns = _parts(node) if isinstance(node, ast.IfExp) else _turns(node)
                passes = isinstance(node, ast.If) and (_passes(node) or _yields(node, compared, counters))
                if number is not None and (turns or (passes and re.search("val|held", name.lower()))):
                    found.append(Split(number.value, number.lineno, name))  # type: ignore[arg-type]
    return found + list(_filtered(tree, given))


def _filtered(tree: ast.Module, given: dict[str, list[ast.expr]]) -> Iterator[Split]:
    """`write("train", (ids for n, ids in documents if n >= held))`; anywhere else, of a number that is called so and of
    documents that are counted: `for row in (row for n, row in enumerate(lines) if n >= held)`."""
    named = {
        id(arg)
        for call in (each for each in nodes(tree) if isinstance(each, ast.Call))
        if any(isinstance(each, ast.Constant) and "train" in str(each.value).lower() for each in call.args)
        for arg in call.args
    }
    for made in (each for each in nodes(tree) if isinstance(each, (ast.GeneratorExp, ast.ListComp))):
        clause = made.generators[0]
        first = clause.target.elts[0] if isinstance(clause.target, ast.Tuple) else None
        counted = isinstance(clause.iter, ast.Call) and _called(clause.iter.func) == "enumerate"
        for test in clause.ifs:
            later = isinstance(test, ast.Compare) and isinstance(test.ops[0], (ast.Gt, ast.GtE))
            if not isinstance(test, ast.Compare) or not later or not isinstance(first, ast.Name):
                continue
            number, name = _number(test.comparators[0], given), _called(test.comparators[0])
            held_back = id(made) in named or (counted and re.search("val|held", name.lower()))
            if getattr(test.left, "id", "") == first.id and number is not None and held_back:
                yield Split(number.value, number.lineno, name)  # type: ignore[arg-type]


def _tokenises(tree: ast.Module) -> bool:
    called = (each.func for each in nodes(tree) if isinstance(each, ast.Call))
    calls = {each.attr for each in called if isinstance(each, ast.Attribute)}
    return bool(calls & {"encode", "encode_ordinary", "encode_as_ids", "encode_batch"}) and bool(
        calls & {"write", "tofile", "tobytes", "write_bytes"}
    )


def _counters(loop: ast.For | ast.While) -> set[str]:
    """Names that a loop counts with: enumerate, or n += 1."""
    found = {
        each.target.id
        for each in nodes(loop)
        if isinstance(each, ast.AugAssign)
        and isinstance(each.op, ast.Add)
        and isinstance(each.target, ast.Name)
        and isinstance(each.value, ast.Constant)
        and each.value.value == 1
    }
    listed = isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call) and _called(loop.iter.func) == "enumerate"
    first = loop.target.elts[0] if listed and isinstance(loop.target, ast.Tuple) else None  # type: ignore[union-attr]
    return found | ({first.id} if isinstance(first, ast.Name) else set())


def _turns(node: ast.If) -> bool:
    """Whether a branch names training text in what it assigns."""
    assigned = [each.value for part in node.body for each in nodes(part) if isinstance(each, ast.Assign)]
    texts = [each.value for value in assigned for each in nodes(value) if isinstance(each, ast.Constant)]
    return any(isinstance(text, str) and "train" in text.lower() for text in texts)


def _parts(node: ast.IfExp) -> bool:
    """Whether one of two arms is what training text is gathered in, by its name, and the other one is not."""
    return ("train" in _called(node.body).lower()) is not ("train" in _called(node.orelse).lower())


def _passes(node: ast.If) -> bool:
    return len(node.body) == 1 and isinstance(node.body[0], ast.Continue)


def _yields(node: ast.If, compared: ast.Compare, counters: set[str]) -> bool:
    """Whether a generator gives only what comes later than a number."""
    later = (ast.Gt, ast.GtE) if getattr(compared.left, "id", "") in counters else (ast.Lt, ast.LtE)
    gives = any(isinstance(each, (ast.Yield, ast.YieldFrom)) for part in node.body for each in nodes(part))
    return gives and not node.orelse and isinstance(compared.ops[0], later)


def _called(node: ast.AST) -> str:
    """The last part of a name; the key of a dict's entry."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return last_name(node)


def _handed(tree: ast.Module) -> dict[str, ast.expr]:
    """What parameters are given by their names, where all calls give them the same."""
    found: dict[str, list[ast.expr]] = {}
    for call in (each for each in nodes(tree) if isinstance(each, ast.Call)):
        for each in call.keywords:
            if each.arg is not None and isinstance(each.value, (ast.Name, ast.Attribute)):
                found.setdefault(each.arg, []).append(each.value)
    return {name: values[0] for name, values in found.items() if len({*map(ast.dump, values)}) == 1}


def _number(node: ast.expr, given: dict[str, list[ast.expr]]) -> ast.Constant | None:
    """The one whole number that an expression is: written there, or under its name."""
    values = [node] if isinstance(node, ast.Constant) else given.get(_called(node), [])
    found = [number for value in values for number in numbers_in(value)]
    return found[0] if len(values) == 1 and len(found) == 1 else None


def numbers_in(value: ast.AST | None) -> Iterator[ast.Constant]:
    """Whole numbers in a tree that may count documents, also as texts: int(os.environ.get("HELD", "10000"))."""
    for each in nodes(value):
        if isinstance(each, ast.Constant):
            text = each.value
            if isinstance(text, str) and text.replace("_", "").isdecimal() and len(text) < 9:
                each = ast.copy_location(ast.Constant(int(text)), each)
            if type(each.value) is int and FEWEST <= each.value <= MOST:
                yield each


def _given(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """name -> what it is given: an assignment, a field, an entry of a dict, a parameter's default, an option's."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            found.setdefault(_called(node.targets[0]), []).append(node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            found.setdefault(_called(node.target), []).append(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    found.setdefault(str(key.value), []).append(value)
        elif isinstance(node, ast.arguments):
            names = [*node.posonlyargs, *node.args]
            first = len(names) - len(node.defaults)
            pairs = [*zip(names[first:], node.defaults, strict=True)]
            keyed = zip(node.kwonlyargs, node.kw_defaults, strict=True)
            pairs += [(name, default) for name, default in keyed if default is not None]
            for name, default in pairs:
                found.setdefault(name.arg, []).append(default)
        elif isinstance(node, ast.Call) and _called(node.func) == "add_argument" and node.args:
            option, given = node.args[-1], {each.arg: each.value for each in node.keywords}
            if isinstance(option, ast.Constant) and "default" in given:
                found.setdefault(str(option.value).lstrip("-").replace("-", "_"), []).append(given["default"])
    return found
