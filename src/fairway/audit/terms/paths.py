"""Ways through a script: both arms of an undecided condition, the rounds of a loop, and how their names meet."""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fairway.audit.terms import assigning
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Frame, Loop

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

ROUNDS_DEPTH = 4  # loops nested deeper than this are read once


def unrolled(m: "Machine", node: ast.For | ast.AsyncFor, items: Sequence[Term], frame: Frame) -> bool:
    """A loop over a few things that are written out: its body once for each."""
    loop = Loop(len(m.conditions))
    frame.loops.append(loop)
    broken: list[tuple[Term | None, dict[str, Term]]] = []
    for one in items:
        loop.continued = []
        assigning.assign(m, node.target, one, frame)
        ended = m.block(node.body, frame)
        left = loop.continued[::-1]
        if ended and left:
            frame.vars = dict(left.pop(0)[1])
        for test, names in left:
            frame.vars = join(m, test, names, frame.vars)
        broken = loop.broken
        if ended and not left and any(test is None for test, _ in broken):
            break
    frame.loops.pop()
    for test, names in broken[::-1]:
        frame.vars = dict(names) if test is None else join(m, test, names, frame.vars)
    return False


def fork(m: "Machine", test: Term, body: Callable[[], bool], orelse: Callable[[], bool], frame: Frame) -> bool:
    """Both ways of an undecided condition; afterwards every name is the one way's, the other's or a choice."""
    before = dict(frame.vars)
    m.conditions.append(test)
    ended_body = body()
    after_body, frame.vars = frame.vars, before
    m.conditions[-1] = Term("op", (test,), "not", test.file, test.line)
    ended_orelse = orelse()
    m.conditions.pop()
    if ended_body or ended_orelse:
        if ended_orelse:
            frame.vars = after_body
        return ended_body and ended_orelse
    frame.vars = join(m, test, after_body, frame.vars)
    return False


def join(m: "Machine", test: Term | None, a: Mapping[str, Term], b: Mapping[str, Term]) -> dict[str, Term]:
    joined = dict(b)
    for name, term in a.items():
        other = b.get(name)
        if other is None or other is term:
            joined[name] = term
        elif test is None:
            joined[name] = Term("merge", (term, other), None, term.file, term.line)
        else:
            joined[name] = Term("choice", (test, term, other), None, test.file, test.line)
    return joined


def loop(m: "Machine", body: list[ast.stmt], orelse: list[ast.stmt], frame: Frame, begin: Callable[[], object]) -> bool:
    loop = Loop(len(m.conditions))
    frame.loops.append(loop)
    m.loops += 1
    broken: list[tuple[Term | None, dict[str, Term]]] = []
    for second in (False, True) if m.loops <= ROUNDS_DEPTH else (False,):
        before = dict(frame.vars)
        loop.continued, loop.broken = [], []
        begin()
        ended = m.block(body, frame)
        left = loop.continued[::-1]
        if ended and left:
            frame.vars = dict(left.pop(0)[1])
        for test, names in left:
            frame.vars = join(m, test, names, frame.vars)
        broken = loop.broken
        if not second:
            frame.vars = join(m, None, before, frame.vars)
    m.loops -= 1
    frame.loops.pop()
    for test, names in broken[::-1]:
        frame.vars = join(m, test, names, frame.vars)
    return m.block(orelse, frame)
