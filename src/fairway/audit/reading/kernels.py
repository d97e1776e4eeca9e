"""Kernels that Triton compiles, and operators that a script adds to torch.

prices(kernel)   whether it writes the loss of each row, `tl.store(loss_ptr + row, lse - logit_of_target)`, and where
priced(tree)     those that do, by their names
operators(tree)  "torch.ops.space.name" of `@torch.library.custom_op("space::name")`, and the function's own name

No kernel is worked out. Its text tells which of its parameters are logits, which the targets whose logits are read, and
which are written with what hangs on these, one number for each target; a gradient, which has columns, is none of them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from fairway.audit.reading.tree import last_name, nodes

_Given = TypeVar("_Given")
_MARKED = ("jit", "autotune", "heuristics")
_ROUNDS = 3  # a loop's second turn knows the names that its first one gives


@dataclass(frozen=True)
class Priced:
    """Of a kernel's parameters, all in their order: the logits, the targets, those that come to hold losses."""

    parameters: tuple[str, ...]
    logits: str
    targets: str
    losses: tuple[str, ...]

    def given(self, args: Sequence[_Given], kwargs: Iterable[tuple[str | None, _Given]]) -> dict[str, _Given]:
        """What a launch hands to each parameter; {} where logits or targets are not among it."""
        found = dict(zip(self.parameters, args, strict=False))
        found.update((name, each) for name, each in kwargs if name is not None)
        return found if self.logits in found and self.targets in found else {}


@lru_cache(maxsize=8)
def priced(tree: ast.AST | None) -> dict[str, Priced]:
    found: dict[str, Priced] = {}
    for node in nodes(tree):
        if isinstance(node, ast.FunctionDef) and (one := prices(node)) is not None:
            found[node.name] = one
    return found


@lru_cache(maxsize=64)
def prices(kernel: ast.AST) -> Priced | None:
    if not isinstance(kernel, ast.FunctionDef) or not any(map(_marks, kernel.decorator_list)):
        return None
    return _Kernel(kernel).priced()


@lru_cache(maxsize=8)
def operators(tree: ast.AST | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in (each for each in nodes(tree) if isinstance(each, ast.FunctionDef)):
        for mark in node.decorator_list:
            name = mark.args[0] if isinstance(mark, ast.Call) and mark.args else None
            own = isinstance(mark, ast.Call) and last_name(mark.func) in ("custom_op", "triton_op")
            if own and isinstance(name, ast.Constant) and isinstance(name.value, str):
                found["torch.ops." + name.value.replace("::", ".")] = node.name
    return found


def _marks(decorator: ast.expr) -> bool:
    return last_name(decorator.func if isinstance(decorator, ast.Call) else decorator) in _MARKED


class _Columns(NamedTuple):
    """tl.arange(0, BLOCK), by where it stands."""

    line: int
    at: int


class _Logit(NamedTuple):
    """The logit of a target, by the parameters that both are read from."""

    logits: str
    targets: str


_Root = str | _Columns | _Logit


class _Kernel:
    """What each name of a kernel hangs on: parameters, columns, and the logit of a target."""

    def __init__(self, kernel: ast.FunctionDef) -> None:
        args = kernel.args
        self.parameters = tuple(each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs))
        self.roots: dict[str, set[_Root]] = defaultdict(set, {name: {name} for name in self.parameters})
        self.pointers = {name: name for name in self.parameters}
        self.columns: dict[str, set[_Columns]] = {}  # of the addresses that a parameter is read at
        self.written: list[tuple[str, set[_Root], set[_Root]]] = []
        for _ in range(_ROUNDS):
            self.written.clear()
            for node in nodes(kernel):
                self._statement(node)

    def priced(self) -> Priced | None:
        for logit in sorted({root for _, _, value in self.written for root in value if isinstance(root, _Logit)}):
            columns = self.columns[logit.targets]
            losses = [name for name, where, value in self.written if logit in value and _columns(where) <= columns]
            if losses:
                return Priced(self.parameters, logit.logits, logit.targets, tuple(dict.fromkeys(losses)))
        return None

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            found, pointer = self._of(node.value), self._pointer(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in (each.id for each in nodes(target) if isinstance(each, ast.Name)):
                    self.roots[name] |= found
                    if pointer and not isinstance(node, ast.AugAssign):
                        self.pointers.setdefault(name, pointer)
        elif isinstance(node, ast.Call) and last_name(node.func) == "store" and len(node.args) > 1:
            pointer = self._pointer(node.args[0])
            if pointer:
                self.written.append((pointer, self._of(node.args[0]), self._of(node.args[1])))

    def _of(self, node: ast.AST) -> set[_Root]:
        """All that a value hangs on."""
        found: set[_Root] = set()
        for each in nodes(node):
            if isinstance(each, ast.Name):
                found |= self.roots[each.id]
            elif isinstance(each, ast.Call) and last_name(each.func) == "arange":
                found.add(_Columns(each.lineno, each.col_offset))
            elif isinstance(each, ast.Call) and last_name(each.func) == "load" and each.args:
                found |= self._read(each.args[0])
            elif isinstance(each, ast.Call) and last_name(each.func) == "where" and each.args:
                found |= self._compared(each)
        return found

    def _read(self, address: ast.expr) -> set[_Root]:
        """logits + target, where a target was read before."""
        pointer, where = self._pointer(address), self._of(address)
        if not pointer:
            return set()
        self.columns.setdefault(pointer, _columns(where))
        return {_Logit(pointer, each) for each in self._pointers(where) if each != pointer}

    def _compared(self, where: ast.Call) -> set[_Root]:
        """tl.where(columns == target, logits, 0.0), of which the sum is the logit of the target."""
        test, kept = where.args[0], set[_Root]().union(*(self._of(each) for each in where.args[1:]))
        if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq)):
            return set()
        logits, targets = self._pointers(kept), self._pointers(self._of(test))
        return {_Logit(each, target) for each in logits for target in targets if each != target}

    def _pointers(self, roots: set[_Root]) -> set[str]:
        """The parameters among them that something was read from."""
        return {each for each in roots if isinstance(each, str) and each in self.columns}

    def _pointer(self, address: ast.AST) -> str:
        """The parameter that an address begins with."""
        while isinstance(address, ast.BinOp):
            address = address.left
        return self.pointers.get(address.id, "") if isinstance(address, ast.Name) else ""


def _columns(roots: set[_Root]) -> set[_Columns]:
    return {each for each in roots if isinstance(each, _Columns)}
