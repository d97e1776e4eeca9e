"""Loops over a text that hand out a guess for each of its tokens: whether a guess hangs on the token itself.

    for t in range(start, stop):
        word = opens[tokens[t]]                 # the answer, which nobody knows yet
        ...
        if not word: hint[t] = held[slot]       # what is handed out for it
        held[slot] = tokens[t]                  # learned afterwards, under the key that was asked

Such loops are kernels of a hundred lines that a compiler takes, and a trial is too slow for. What is asked here is the
order of one turn: which token is learned last under a key that does not hold it, and whether something that is stored
for this turn before, out of the same tables, was worked out of that token, or under a condition that was.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fairway.audit.reading.tree import nodes

_TURNS = 2  # of an inner loop: what its first turn leaves is known in the second
_DEEP = 3  # loops in loops: further in, one turn is asked, as each level doubles what is read
_LEAVES = (ast.Continue, ast.Break, ast.Return)


class Answer(NamedTuple):
    """line: where the token is read; stored: where what hangs on it is handed out."""

    line: int
    stored: int


class _Token(NamedTuple):
    """text[turn + ahead]"""

    text: str
    ahead: int
    line: int


class _Table(NamedTuple):
    """An array that was read under a key, or handed to who reads it."""

    name: str


_Tags = frozenset[_Token | _Table]
_NONE: _Tags = frozenset()


def answers(tree: ast.AST | None) -> Iterator[Answer]:
    """Of every loop of a script that knows what it should not."""
    for loop in nodes(tree):
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and _is_range(loop.iter):
            yield from _Turn(loop.target.id).of(loop)


def _is_range(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("range", "prange")


@dataclass
class _Turn:
    """One turn of a loop, in order. index: what it counts with; names: what they were made of, or under; tokens: names
    that are a token itself; handed: (line, what it was made of, how far from the turn's its place is), of what is
    stored for a turn; fed: the token that is learned, in which tables, and after how many of those."""

    index: str
    names: dict[str, _Tags] = field(default_factory=dict)
    tokens: dict[str, _Token] = field(default_factory=dict)
    under: _Tags = _NONE
    depth: int = 0
    handed: list[tuple[int, _Tags, int]] = field(default_factory=list)
    fed: list[tuple[_Token, set[str], int]] = field(default_factory=list)

    def of(self, loop: ast.For) -> Iterator[Answer]:
        self._block(loop.body)
        if not self.fed:
            return
        newest = max(token.ahead for token, _, _ in self.fed)
        last = [each for each in self.fed if each[0].ahead == newest]
        text, first = last[0][0].text, min(number for _, _, number in last)
        tables = set[str]().union(*(each for _, each, _ in last))
        ahead = {place for _, _, place in self.handed[:first]}  # places of which something was said before
        for number, (line, tags, place) in enumerate(self.handed):
            least = newest if number < first or place in ahead else newest + 1  # what is learned by then may be known
            known = [tag for tag in tags if isinstance(tag, _Token) and tag.text == text and tag.ahead >= least]
            if known and any(isinstance(tag, _Table) and tag.name in tables for tag in tags):
                yield Answer(min(tag.line for tag in known), line)

    # -- statements -----------------------------------------------------------------------------------------------

    def _block(self, statements: list[ast.stmt]) -> None:
        before = self.under
        for each in statements:
            self._statement(each)
            if isinstance(each, ast.If) and any(
                isinstance(arm[-1], _LEAVES) for arm in (each.body, each.orelse) if arm
            ):
                self.under |= self._tags(each.test)  # what follows is reached by whoever did not leave
        self.under = before

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            tags = self._tags(node.value) | self.under
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._bind(target, node.value, tags, isinstance(node, ast.AugAssign))
        elif isinstance(node, ast.If):
            before = self.under
            self.under |= self._tags(node.test)
            self._block(node.body)
            self._block(node.orelse)
            self.under = before
        elif isinstance(node, (ast.For, ast.While)):
            self.depth += 1
            for _ in range(_TURNS if self.depth <= _DEEP else 1):
                if isinstance(node, ast.For):
                    self._bind(node.target, node.iter, self._tags(node.iter), False)
                self._block(node.body)
            self.depth -= 1
        elif isinstance(node, ast.With):
            self._block(node.body)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._called(node.value)

    def _bind(self, target: ast.expr, value: ast.expr, tags: _Tags, more: bool) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            parts = (
                value.elts if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts) else []
            )
            for n, each in enumerate(target.elts):
                self._bind(
                    each, parts[n] if parts else value, self._tags(parts[n]) | self.under if parts else tags, more
                )
        elif isinstance(target, ast.Name):
            token = None if more else self._token(value)
            self.tokens.pop(target.id, None)
            if token is not None:
                self.tokens[target.id] = token
            self.names[target.id] = tags | self.names.get(target.id, _NONE) if more else tags
        elif isinstance(target, ast.Subscript) and (name := _base(target)):
            place = self._ahead(target.slice)
            if place is not None:
                self.handed.append((target.lineno, tags, place))
                return
            for each in value.elts if isinstance(value, ast.Tuple) else (value,):
                self._feed(each, self._tags(target.slice), {name})
            self.names[name] = self.names.get(name, _NONE) | tags

    def _called(self, call: ast.Call) -> None:
        """feed(table[e], slots[e], token): what a helper is handed it may write into the arrays beside it."""
        given = [self._tags(arg) for arg in call.args]
        arrays = [_base(arg) if isinstance(arg, (ast.Name, ast.Subscript)) else "" for arg in call.args]
        for n, arg in enumerate(call.args):
            beside = {name for m, name in enumerate(arrays) if name and m != n}
            self._feed(arg, _NONE.union(*given[:n], *given[n + 1 :]), beside)
        every = _NONE.union(*given) | self.under
        for name in filter(None, arrays):
            self.names[name] = self.names.get(name, _NONE) | every

    def _feed(self, value: ast.expr, key: _Tags, tables: set[str]) -> None:
        """A token is learned under a key that was not made of it."""
        token = self._token(value)
        held = {(tag.text, tag.ahead) for tag in key if isinstance(tag, _Token)}
        if token is not None and (token.text, token.ahead) not in held and token.text not in tables:
            self.fed.append((token, tables, len(self.handed)))

    def _token(self, value: ast.expr) -> _Token | None:
        """text[t], int(text[t]), or the name of it."""
        if isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
            return self._token(value.args[0])
        if isinstance(value, ast.Name):
            return self.tokens.get(value.id)
        ahead = self._ahead(value.slice) if isinstance(value, ast.Subscript) else None
        name = _base(value)
        return _Token(name, ahead, value.lineno) if ahead is not None and name else None

    # -- expressions ----------------------------------------------------------------------------------------------

    def _tags(self, node: ast.AST) -> _Tags:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, _NONE)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return self._matched(node)
        found = _NONE.union(*(self._tags(each) for each in ast.iter_child_nodes(node)))
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and (name := _base(node)):
            ahead = self._ahead(node.slice)
            if ahead is not None:
                return found | {_Token(name, ahead, node.lineno)}
            if not any(isinstance(each, ast.Name) and each.id == self.index for each in nodes(node.slice)):
                return found | {_Table(name)}
        if isinstance(node, ast.Call):
            handed = (arg for arg in node.args if isinstance(arg, (ast.Name, ast.Subscript)))
            return found | {_Table(name) for arg in handed if (name := _base(arg))}
        return found

    def _matched(self, node: ast.Compare) -> _Tags:
        """Whether a guess is the token: what a right one earns, and no look at the token before."""
        sides = [node.left, *node.comparators]
        tags = [self._tags(each) for each in sides]
        for token, guess in ((0, 1), (1, 0)):
            if self._token(sides[token]) is not None and any(isinstance(tag, _Table) for tag in tags[guess]):
                return tags[guess]
        return _NONE.union(*tags)

    def _ahead(self, index: ast.expr) -> int | None:
        """0 of [t], 1 of [t + 1], also of [int(t)] and, in a part of the text, of [t - start]; None of what is no place
        of this turn."""
        if isinstance(index, ast.Call) and len(index.args) == 1 and not index.keywords:
            return self._ahead(index.args[0])
        if (
            isinstance(index, ast.BinOp)
            and isinstance(index.op, (ast.Add, ast.Sub))
            and isinstance(index.right, ast.Constant)
        ):
            begun, number = self._ahead(index.left), index.right.value
            if begun is None or type(number) is not int:
                return None
            return begun + number if isinstance(index.op, ast.Add) else begun - number
        if isinstance(index, ast.BinOp) and isinstance(index.op, ast.Sub) and isinstance(index.right, ast.Name):
            return self._ahead(index.left)
        return 0 if isinstance(index, ast.Name) and index.id == self.index else None


def _base(node: ast.expr) -> str:
    """The array of `held`, `held[e]`, `self.held[e, slot]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
