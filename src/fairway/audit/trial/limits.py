"""Numbers that the text of a trial does not reach, `min(chunks, args.most)`, `documents[:10_000]`: the whole text does.

A trial counts every target although a script scores a part of the text only, where that part is larger than the short
text. So a trial writes down what it held against which number of the script; and another one can be told to take such a
number for less than the text holds.

Chunks that are larger than the short text hide the order of what happens between them. A number that cuts the text into
one piece, or that all of it was held against, is taken for less, and the trial begun anew.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from fairway.audit.reading.tree import nodes

FINE = 5  # chunks
MOST = 3  # numbers: each begins the trial anew
_PLAIN = 4_096  # a number up to this that is written out may be anything: the bytes of a header
_FIXED = ("head", "byte", "offset", "dim", "width", "item", "bucket", "hash")
"""Words in names of numbers up to that which are no length of a text."""
_PLACES = frozenset(("start", "begin", "first", "end", "stop", "last", "lo", "hi", "at", "pos", "index", "idx"))
"""Words in names of where something is: `chunk_start` may come to what chunks are long somewhere, and is no length."""
CHUNK = 4_000_000  # tokens: larger chunks are none, but limits
WHOLE = 0.9  # of the text: what is cut, is all of it but a rest

Site = tuple[int, int, str]
"""Line, column, and the name of the number; "" where it is written out."""


@dataclass
class Seen:
    """What one number was held against. limit: the number, None where it was not always the same; most, least: the
    largest and the smallest of what it was held against; reached: whether that was ever more than it."""

    limit: int | None
    most: int
    least: int
    reached: bool = False

    def met(self, value: int, limit: int) -> None:
        if limit != self.limit:
            self.limit = None
        if value > limit:
            self.reached = True
        if value > self.most:
            self.most = value
        elif value < self.least:
            self.least = value


@dataclass(frozen=True)
class Forced:
    """A number that is taken for another wherever it stands by its name, or is written out: a batch that is smaller in
    one place is so in all, and what begins where another part ends still does. Without a site, under all names that
    have this word in them; a letter is the whole name, `V`. here: of a number that is written out, at its site alone:
    64 is the stride in one line and the shortest document in another."""

    site: Site | None
    limit: int
    value: int
    word: str = ""
    here: bool = False

    def of(self, name: str) -> bool:
        """Whether a number of this name is meant, where no word says so; "" is the name of one that is written out."""
        if self.site is not None:
            return self.site[2] == name
        return self.limit > _PLAIN or (bool(name) and not any(word in name.lower() for word in _FIXED))


@dataclass
class Limits:
    """Of one trial."""

    forced: tuple[Forced, ...] = ()
    seen: dict[Site, Seen] = field(default_factory=dict)
    taken: set[tuple[int, int]] = field(default_factory=set)  # numbers with a name that were taken for others
    _meant: dict[str, dict[int, int]] = field(default_factory=dict)  # by name: a script says the same ones often

    def held_against(self, site: Site | None, value: object, limit: object) -> None:
        """value is held against the limit that stands there."""
        if site is None or type(value) is not int or type(limit) is not int:
            return
        seen = self.seen.get(site)
        if seen is None:
            seen = self.seen[site] = Seen(limit, value, value)
        seen.met(value, limit)

    def named(self, name: str) -> dict[int, int]:
        """What numbers of this name, or ones that are written out, are taken for."""
        if name not in self._meant:
            forced = (each for each in self.forced if not each.word and not each.here)
            meant = {each.limit: each.value for each in forced if each.of(name)}
            small = name.lower()
            is_place = not _PLACES.isdisjoint(small.split("_"))
            for word, numbers in () if is_place else self._by_word.items():
                if word in small if len(word) > 1 else word == name:
                    meant |= numbers
            self._meant[name] = meant
        return self._meant[name]

    @cached_property
    def _by_word(self) -> dict[str, dict[int, int]]:
        """A script has some forty numbers with as many words, and nine hundred names."""
        found: dict[str, dict[int, int]] = {}
        for each in self.forced:
            if each.word:
                found.setdefault(each.word, {})[each.limit] = each.value
        return found

    def written(self, node: ast.Constant) -> dict[int, int]:
        """What a number that is written out there is taken for at this site alone."""
        here = node.lineno, node.col_offset
        return {each.limit: each.value for each in self.forced if each.here and each.site and each.site[:2] == here}

    def at(self, node: ast.BinOp) -> int | None:
        """What is taken for a number that is computed there."""
        computed = [each for each in self.forced if each.site is not None and not is_named(each.site)]
        site = limit_of(node) if computed else None
        return next((each.value for each in computed if each.site == site), None)

    def fresh(self, number: int) -> bool:
        """Whether the trial may be begun anew with this number taken for another."""
        found = [each.limit for each in self.forced if not each.word]
        return len(found) < MOST and number not in found

    def cutting(self, length: int) -> int | None:
        """A number that all of the text was held against in vain, `if end - begun >= args.chunk_tokens`, and that is no
        larger than chunks are."""
        named = (seen for site, seen in self.seen.items() if is_named(site))
        whole = (seen for seen in named if not seen.reached and WHOLE * length <= seen.most <= length)
        limits = (seen.limit for seen in whole if seen.limit is not None and length < seen.limit <= CHUNK)
        return next((limit for limit in limits if self.fresh(limit)), None)

    def unmet(self, most: Callable[[int], float]) -> dict[Site, Seen]:
        """The numbers that were never reached and never changed. most: of as many as were held against one, how many a
        whole text has at least: what is more is no limit."""
        return {
            site: seen
            for site, seen in self.seen.items()
            if seen.limit is not None and not seen.reached and 1 < seen.most < seen.limit < most(seen.most)
        }


class Coarse(BaseException):
    """A number cuts the text of the trial into one piece."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def finer(number: int, length: int) -> Forced:
    """Such a number, taken for what cuts the text into five."""
    return Forced(None, number, length // FINE)


def alone(tree: ast.Module | None, number: int) -> bool:
    """Whether a script writes out no number that goes with this one by one: `val[i : i + 65536]` would not fit to
    `val[i + 1 : i + 65537]` any more."""
    said = (each.value for each in nodes(tree) if isinstance(each, ast.Constant)) if tree is not None else ()
    return not any(type(each) is int and abs(each - number) == 1 for each in said)


def site_of(node: ast.expr) -> Site | None:
    """Of a number that has a name, or is written out, `most or len(chunks)` among them; None of what is computed, which
    may move with the text."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return site_of(node.values[0])
    if isinstance(node, ast.Name):
        return node.lineno, node.col_offset, node.id
    if isinstance(node, ast.Attribute):
        return node.lineno, node.col_offset, node.attr
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.lineno, node.col_offset, ""
    return None


_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Pow, ast.LShift)
_ROUNDS = frozenset(("int", "round"))


def limit_of(node: ast.expr) -> Site | None:
    """The same, and that of what is computed of names and numbers alone, `first + most * args.rows`, whose name is what
    is written there: a trial over a text of another length tells whether it moves with it."""
    computed = isinstance(node, ast.BinOp) and _is_computed(node)
    return (node.lineno, node.col_offset, f"({ast.unparse(node)})") if computed else site_of(node)


def _is_computed(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, _ARITHMETIC) and _is_computed(node.left) and _is_computed(node.right)
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") in _ROUNDS and len(node.args) == 1 and _is_computed(node.args[0])
    return site_of(node) is not None and not isinstance(node, ast.BoolOp)


def is_named(site: Site) -> bool:
    """Whether a number has a name, or is written out: what is computed is neither."""
    return not site[2].startswith("(")


_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@lru_cache(maxsize=8)
def looped(tree: ast.AST) -> frozenset[int]:
    """The ids of the nodes that stand in loops: what is cut there is cut again in the next turn."""
    found: set[int] = set()
    for node in nodes(tree):
        if isinstance(node, _LOOPS):
            begun = node.iter if isinstance(node, (ast.For, ast.AsyncFor)) else None
            outside = {id(each) for each in nodes(begun)} if begun is not None else set()
            found.update(id(each) for each in nodes(node) if id(each) not in outside)
    return frozenset(found)


__all__ = [
    "CHUNK",
    "Coarse",
    "Forced",
    "Limits",
    "Seen",
    "Site",
    "alone",
    "finer",
    "is_named",
    "limit_of",
    "looped",
    "site_of",
]
