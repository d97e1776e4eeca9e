"""match: which of its cases may be taken, and what their patterns bind."""

import ast
from typing import TYPE_CHECKING

from fairway.audit.terms import assigning, attributes, expressions, items, paths
from fairway.audit.terms.term import Term, alternatives
from fairway.audit.terms.things import Class, Frame, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

_PLAIN = frozenset(("str", "int", "float", "bool", "bytes", "list", "tuple", "dict", "set"))


def match(m: "Machine", subject: Term, cases: list[ast.match_case], frame: Frame) -> bool:
    """Reads the first case that must be taken, and those before it that may be. Answers whether the path ends."""
    if not cases:
        return False
    first, rest = cases[0], cases[1:]
    tests = bound(m, first.pattern, subject, frame)
    if first.guard is not None:
        tests.append(expressions.value(m, first.guard, frame))
    if any(m.holds(test) is False for test in tests):
        return match(m, subject, rest, frame)
    undecided = [test for test in tests if m.holds(test) is None]
    if not undecided:
        return m.block(first.body, frame)
    test = undecided[0]
    if len(undecided) > 1:
        test = Term("op", tuple(undecided), "and", frame.file, first.pattern.lineno)
    return paths.fork(m, test, lambda: m.block(first.body, frame), lambda: match(m, subject, rest, frame), frame)


def bound(m: "Machine", pattern: ast.pattern, subject: Term, frame: Frame) -> list[Term]:
    """Binds a pattern's names to parts of the subject; the conditions under which it fits."""
    file, line = frame.file, pattern.lineno
    if isinstance(pattern, ast.MatchAs):
        tests = bound(m, pattern.pattern, subject, frame) if pattern.pattern is not None else []
        if pattern.name is not None:
            assigning.bind(m, pattern.name, _narrowed(m, pattern.pattern, subject, frame), frame)
        return tests
    if isinstance(pattern, ast.MatchValue):
        return [expressions.compared(m, ast.Eq(), subject, expressions.value(m, pattern.value, frame), file, line)]
    if isinstance(pattern, ast.MatchSingleton):
        return [expressions.compared(m, ast.Is(), subject, constant(pattern.value, file, line), file, line)]
    if isinstance(pattern, ast.MatchOr):
        options = [_all(bound(m, one, subject, frame), file, line) for one in pattern.patterns]
        if any(m.holds(one) for one in options):
            return []
        return [Term("op", tuple(options), "or", file, line)]
    if isinstance(pattern, ast.MatchSequence):
        return _sequence(m, pattern, subject, frame)
    if isinstance(pattern, ast.MatchMapping):
        tests = []
        for key, inner in zip(pattern.keys, pattern.patterns, strict=True):
            place = expressions.value(m, key, frame)
            tests.append(expressions.compared(m, ast.In(), place, subject, file, line))
            tests.extend(bound(m, inner, items.item(m, subject, place, file, line), frame))
        if pattern.rest is not None:
            assigning.bind(m, pattern.rest, subject, frame)
        return tests
    if isinstance(pattern, ast.MatchClass):
        return _instance(m, pattern, subject, frame)
    return []


def _all(tests: list[Term], file: str, line: int) -> Term:
    if not tests:
        return constant(True, file, line)
    return tests[0] if len(tests) == 1 else Term("op", tuple(tests), "and", file, line)


def _sequence(m: "Machine", pattern: ast.MatchSequence, subject: Term, frame: Frame) -> list[Term]:
    file, line = frame.file, pattern.lineno
    count = len(pattern.patterns)
    starred = next((i for i, one in enumerate(pattern.patterns) if isinstance(one, ast.MatchStar)), None)
    known = subject.op in ("tuple", "list") and subject.value != "comp"
    fits = len(subject.parts) == count if starred is None else len(subject.parts) >= count - 1
    tests = [constant(fits, file, line)] if known else [Term("call", (subject,), "len", file, line, (0,))]
    for at, one in enumerate(pattern.patterns):
        if isinstance(one, ast.MatchStar):
            if one.name is not None:
                cut = Term("slice", tuple(constant(None, file, line) for _ in range(3)), None, file, line)
                assigning.bind(m, one.name, items.item(m, subject, cut, file, line), frame)
            continue
        place = at if starred is None or at < starred else at - count
        tests.extend(bound(m, one, items.item(m, subject, constant(place, file, line), file, line), frame))
    return tests


def _instance(m: "Machine", pattern: ast.MatchClass, subject: Term, frame: Frame) -> list[Term]:
    """Class(a, name=b): fields in order, and by name."""
    file, line = frame.file, pattern.lineno
    kind = expressions.value(m, pattern.cls, frame)
    tests = [_is_instance(subject, kind, file, line)]
    inside = _of_kind(subject, kind)
    if kind.op == "class":
        listed = kind.value.find("__match_args__")
        names = [str(part.value) for part in listed.parts] if listed is not None else list(kind.value.all_fields())
    else:
        names = []
    for at, one in enumerate(pattern.patterns):
        if str(kind.value) in _PLAIN:
            tests.extend(bound(m, one, subject, frame))
        elif at < len(names):
            tests.extend(bound(m, one, attributes.attribute(m, inside, names[at], file, line), frame))
        else:
            tests.extend(bound(m, one, Term("item", (inside, constant(at, file, line)), None, file, line), frame))
    for word, one in zip(pattern.kwd_attrs, pattern.kwd_patterns, strict=True):
        tests.extend(bound(m, one, attributes.attribute(m, inside, word, file, line), frame))
    return tests


def _narrowed(m: "Machine", pattern: ast.pattern | None, subject: Term, frame: Frame) -> Term:
    """What is left of the subject where the pattern names a class."""
    if isinstance(pattern, ast.MatchClass):
        return _of_kind(subject, expressions.value(m, pattern.cls, frame))
    return subject


def _is_instance(subject: Term, kind: Term, file: str, line: int) -> Term:
    options = alternatives(subject, 24)
    if kind.op == "class" and all(one.op in ("object", "const") for one in options):
        fitting = [one.op == "object" and is_kind(one.value.kind, kind.value) for one in options]
        if all(fitting) or not any(fitting):
            return constant(all(fitting), file, line)
    return Term("call", (subject, kind), "isinstance", file, line, (0, 1))


def _of_kind(subject: Term, kind: Term) -> Term:
    """The objects of a class among those that a value may be; all of it where none is known."""
    if kind.op != "class":
        return subject
    fitting = [one for one in alternatives(subject, 24) if one.op == "object" and is_kind(one.value.kind, kind.value)]
    if not fitting:
        return subject
    return fitting[0] if len(fitting) == 1 else Term("merge", tuple(fitting), None, subject.file, subject.line)


def is_kind(kind: Class, wanted: Class) -> bool:
    return kind is wanted or any(is_kind(base, wanted) for base in kind.bases)
