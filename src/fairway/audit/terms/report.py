"""The reported number: which printed value is the score, and what it divides by what."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fairway.audit.submission import Submission
from fairway.audit.terms.octets import counts_bytes, parts_of
from fairway.audit.terms.program import Program
from fairway.audit.terms.term import Term, alternatives, peel, same, walk
from fairway.audit.terms.things import Event

DIAGNOSIS = re.compile(
    r"diag|debug|sanity|\bcheck(?:_|\b)|ablation|for comparison|\bnotes only\b"
    r"|not (?:the |an? |our |counted )?(?:\w+ )?(?:score|reported|submitted)"
    r"|illegal|upper bound|oracle|appendix|curiosity|\bwould (?:be|have been)\b"
    r"|information only|for information|informational|for reference|\blog(?:ged)? only|only logged",
    re.I,
)
"""What a text says beside a number that is no score."""

IN_BITS = re.compile(r"bpb|bits[ _]per[ _]byte", re.I)
_SAYING = frozenset(("print", "info", "warning", "debug", "write", "write_text", "log", "dump", "dumps", "writerow"))
_LOSSES = frozenset(
    ("cross_entropy", "nll_loss", "log_softmax", "logsumexp", "CrossEntropyLoss", "logaddexp", "NLLLoss")
)
_LOGS = frozenset(("log", "log2", "log1p", "log_", "log10"))


@dataclass(frozen=True)
class Number:
    """A number that is said. event: the call that says it; term: the number; label: the literal text around it."""

    event: Event
    term: Term
    label: str


class Flags:
    """What stands somewhere below a term, computed once for the whole graph: a logarithm of 2, a loss."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Term, bool, bool]] = {}

    def of(self, root: Term) -> tuple[bool, bool]:
        """(log 2, loss)."""
        order = [(root, False)]
        while order:
            term, done = order.pop()
            if id(term) in self.known:
                continue
            if not done:
                order.append((term, True))
                order.extend((part, False) for part in _made_of(term) if id(part) not in self.known)
                continue
            two, loss = is_log_two(term), is_loss(term)
            for part in _made_of(term):
                known = self.known.get(id(part))
                if known is not None:
                    two, loss = two or known[1], loss or known[2]
            self.known[id(term)] = (term, two, loss)
        return self.known[id(root)][1:]


def _made_of(term: Term) -> tuple[Term, ...]:
    """The parts whose values are in a value: not the conditions that chose between them."""
    return term.parts[1:] if term.op == "choice" else parts_of(term)


def is_log_two(term: Term) -> bool:
    """ln 2, 1/ln 2, or a logarithm to base 2."""
    if term.op == "const" and isinstance(term.value, float):
        return math.isclose(term.value, math.log(2), rel_tol=1e-4) or math.isclose(
            term.value, 1 / math.log(2), rel_tol=1e-4
        )
    return term.op == "call" and term.called == "log2"


def is_loss(term: Term) -> bool:
    """A call that makes losses out of logits or probabilities, or one of a model that was not entered."""
    if term.op != "call":
        return False
    if term.called in _LOSSES or (term.called in _LOGS and not all(p.op == "const" for p in term.parts)):
        return True
    return term.value == "()" or term.called in ("forward", "__call__")


class Report:
    """What one program says of its score."""

    def __init__(self, program: Program, submission: Submission) -> None:
        self.program = program
        self.submission = submission
        self.flags = Flags()

    @cached_property
    def numbers(self) -> list[Number]:
        """Every number said that is made of losses, in order."""
        found: list[Number] = []
        for event in self.program.events:
            if event.term.called not in _SAYING and not any(part.op == "text" for part in event.term.parts):
                continue
            if event.term.called == "dump" and event.term.value not in ("json.dump", "yaml.dump"):
                continue
            for part in event.term.parts:
                found.extend(Number(event, term, label) for term, label in _fields(part) if self.flags.of(term)[1])
        return found

    @cached_property
    def scores(self) -> list[Number]:
        """Those in bits: a logarithm of 2 is in them; where there are none, those whose label says so; else all."""
        in_bits = [n for n in self.numbers if self.flags.of(n.term)[0]]
        labelled = [n for n in self.numbers if re.search(r"bpb|bits|byte", n.label, re.IGNORECASE)]
        return in_bits or labelled or self.numbers

    @cached_property
    def reported(self) -> list[Number]:
        """The score: the number whose text the log prints with the value that is claimed; else the last one said,
        and those before it that are said whatever the undecided conditions are."""
        claimed = self._claimed()
        if claimed:
            return claimed
        meant = [n for n in self.scores if not DIAGNOSIS.search(n.label)] or self.scores
        whole = [n for n in meant if self._divides_by_bytes(n)] or meant
        outside = [n for n in whole if n.event.loops == 0] or whole
        named = [n for n in meant if n.event.loops == 0 and IN_BITS.search(n.label)]
        if not any(n in outside for n in named):  # bits of weights, of an ideal coder, are no bits per byte
            outside = named or outside
        if not outside:
            return []
        last = [n for n in outside if n.event.term is outside[-1].event.term]
        taken = list(last)
        if outside[-1].event.conditions:
            certain = [n for n in outside if len(n.event.conditions) < len(outside[-1].event.conditions)]
            taken += [n for n in certain if n.event.term is certain[-1].event.term] if certain else []
        return taken

    def _divides_by_bytes(self, number: Number) -> bool:
        """Whether a count of bytes, or a constant in its place, is in a number: bits per byte, not per token."""
        return any(
            any(counts_bytes(term) for term in (*f.down, *f.up) if not self.flags.of(term)[1]) or is_assumed(f)
            for f in fractions(number.term)
        )

    def _claimed(self) -> list[Number]:
        value = claimed_value(self.submission.claims)
        if value is None:
            return []
        logs = [text.splitlines() for text in self.submission.logs.values()]
        found = []
        for number in self.scores:
            words = [word for word in re.findall(r"[A-Za-z_]{4,}", number.label.split("\0")[0])]
            if words and any(_prints(line, value) for line in last_of_kind(logs, words)):
                found.append(number)
        return found[-2:]


def last_of_kind(logs: Iterable[list[str]], words: list[str]) -> Iterator[str]:
    """Of each log the last line with all of these words: a sum that is said on the way comes near to any claim once."""
    for lines in logs:
        line = next((line for line in reversed(lines) if all(word in line for word in words)), None)
        if line is not None:
            yield line


def claimed_value(claims: Any) -> float | None:
    """val_bpb of submission.json."""
    if isinstance(claims, dict):
        for key in ("val_bpb", "val_bpb_exact", "bpb", "score"):
            if isinstance(claims.get(key), (int, float)):
                return float(claims[key])
    return None


def _prints(line: str, value: float) -> bool:
    """Whether a line prints this number, to the digits that the claim or the line has."""
    for text in re.findall(r"\d\.\d{3,}", line):
        digits = min(len(text) - 2, len(f"{value}".partition(".")[2]))
        if digits >= 3 and abs(float(text) - value) < 0.6 * 10.0**-digits:
            return True
    return False


def _fields(term: Term, label: str = "", depth: int = 8) -> list[tuple[Term, str]]:
    """The values in what is said, each with the literal text around it."""
    if term.op == "text":
        label = "".join(str(p.value) if p.op == "const" else "\0" for p in term.parts)
        return [pair for p in term.parts if p.op != "const" for pair in _fields(p, label, depth - 1)]
    if term.op == "const" or not depth:
        return []
    if term.op == "dict" and term.value != "comp":
        pairs = zip(term.parts[::2], term.parts[1::2], strict=False)
        return [pair for key, p in pairs for pair in _fields(p, str(key.constant() or ""), depth - 1)]
    if term.op in ("list", "tuple", "choice", "merge"):
        options = term.parts[1:] if term.op == "choice" else term.parts
        return [pair for p in options for pair in _fields(p, label, depth - 1)]
    if term.op == "op" and term.value in ("+", "%") and any(_is_text(p) for p in term.parts):
        words = "".join(str(p.value) for p in term.parts if p.op == "const")
        return [pair for p in term.parts for pair in _fields(p, words or label, depth - 1)]
    if term.op == "call" and term.called in ("format", "join", "dumps", "str", "round", "asdict"):
        words = "".join(str(p.value) for p in term.parts if p.op == "const" and isinstance(p.value, str))
        return [pair for p in term.parts for pair in _fields(p, words or label, depth - 1)]
    if term.op == "object":
        held = [] if term.value.held is None else _fields(term.value.held, label, depth - 1)
        return held + [pair for name, p in term.value.attrs.items() for pair in _fields(p, name, depth - 1)]
    return [(term, label[:400])]


def _is_text(term: Term) -> bool:
    return (
        term.op == "text"
        or (term.op == "const" and isinstance(term.value, str))
        or (term.op == "op" and term.value == "+" and any(_is_text(part) for part in term.parts))
    )


@dataclass(frozen=True)
class Fraction:
    """A number as a product: up over down, constants apart."""

    up: tuple[Term, ...]
    down: tuple[Term, ...]
    constants: tuple[Term, ...]


_CHOOSING = frozenset(("min", "max", "minimum", "maximum", "amin", "amax", "sorted"))
_AVERAGING = frozenset(("sum", "mean", "fmean", "fsum", "median", "average"))
_DEPTH = 24


def fractions(term: Term, limit: int = 12) -> list[Fraction]:
    """What a number divides by what, for each of the values that it may be; factors that stand above and below are
    left out."""
    found = [_cancelled(*each) for each in _factors(term, limit, _DEPTH)]
    return found[:limit]


def _factors(term: Term, limit: int, depth: int) -> list[tuple[list[Term], list[Term], list[Term]]]:
    result: list[tuple[list[Term], list[Term], list[Term]]] = []
    for one in alternatives(term, limit):
        if one.op == "op" and one.value in ("*", "/") and depth:
            lefts = _factors(one.parts[0], limit, depth - 1)
            rights = _factors(one.parts[1], limit, depth - 1)
            for a in lefts[:limit]:
                for b in rights[:limit]:
                    up, down = (b[0], b[1]) if one.value == "*" else (b[1], b[0])
                    result.append((a[0] + up, a[1] + down, a[2] + b[2]))
        elif one.op == "call" and one.called in _CHOOSING and depth and not any(p.op == "const" for p in one.parts):
            for part, key in zip(one.parts, one.keys, strict=True):
                if key != "key":
                    result.extend(_factors(part, limit, depth - 1))
        elif depth > _DEPTH - 4 and _averaged(one):
            each = [factors for part in _averaged(one) for factors in _factors(part, limit, depth - 1)]
            result.extend(each if all(down for _, down, _ in each) else [([one], [], [])])
        elif one.op in ("list", "tuple") and depth:
            for part in one.parts[:4]:
                result.extend(_factors(part, limit, depth - 1))
        elif one.op == "call" and one.called in ("max", "clamp", "clamp_min", "maximum") and depth:
            inner = one.operand()
            others = [p for p in one.parts if p is not inner]
            if inner is not None and all(p.op == "const" for p in others):
                result.extend(_factors(inner, limit, depth - 1))
            elif others and inner is not None and inner.op == "const":
                result.extend(_factors(others[0], limit, depth - 1))
            else:
                result.append(([one], [], []))
        elif one.op == "call" and one.called in ("div", "true_divide", "divide", "mul", "multiply") and depth:
            over, under = one.operand(), one.at(1)
            if over is not None and under is not None:
                sign = "/" if "div" in one.called else "*"
                result.extend(_factors(Term("op", (over, under), sign, one.file, one.line), limit, depth - 1))
        elif one.op == "const":
            result.append(([], [], [one]))
        else:
            result.append(([one], [], []))
        if len(result) > limit:
            break
    return result[:limit]


def _averaged(term: Term) -> tuple[Term, ...]:
    """The numbers that an average is made of: a + b, mean([a, b]); it is one of them as far as units are concerned."""
    if term.op == "op" and term.value == "+":
        return term.parts
    listed = term.operand() if term.op == "call" and term.called in _AVERAGING else None
    return listed.parts if listed is not None and listed.op in ("list", "tuple") and listed.value != "comp" else ()


def _cancelled(up: list[Term], down: list[Term], constants: list[Term]) -> Fraction:
    kept, rest = [], list(down)
    for term in up:
        match = next((other for other in rest if same(peel(term), peel(other), 8)), None)
        if match is None:
            kept.append(term)
        else:
            rest.remove(match)
    return Fraction(tuple(kept), tuple(rest), tuple(constants))


def is_assumed(fraction: Fraction) -> Term | None:
    """The constant that stands for bytes: a plain number between 1.5 and 8, or a total of the whole split."""
    for term in fraction.constants:
        if _plausible(term):
            return term
    for factor in fraction.down:
        for term in _arithmetic(factor):
            if term.op == "op" and term.value in ("*", "/"):
                found = next((part for part in term.parts if _plausible(part)), None)
                if found is not None:
                    return found
            if term.op == "call" and term.called in ("full", "full_like"):  # as many for each token
                filled = term.at(1, "fill_value")
                if filled is not None and _plausible(filled):
                    return filled
    return None


def used_at(root: Term, constant: Term) -> Term:
    """The product or quotient that a constant is a factor of, be it named elsewhere; else the constant where it is
    written out: the default of a setting, not the helper that asks the environment for it."""
    for term in walk(root):
        product = term.op == "op" and term.value in ("*", "/")
        if product and any(peel(part) is constant for part in term.parts):
            return term
    while len(constant.parts) == 1 and constant.parts[0].op == "const" and constant.parts[0].value == constant.value:
        constant = constant.parts[0]
    return constant


def _arithmetic(root: Term) -> Iterator[Term]:
    """The sums and products that a count is made of, down to what is counted."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < 200:
        term = peel(waiting.pop())
        if id(term) in seen:
            continue
        seen.add(id(term))
        yield term
        if term.op in ("op", "merge", "list", "tuple") or (term.op == "mutate" and term.value == ".add_"):
            waiting.extend(term.parts)
        elif term.op == "choice":
            waiting.extend(term.parts[1:])
        elif term.op == "store" and len(term.parts) > 2:  # a column of sums by document
            waiting.append(term.parts[2])
        elif term.op == "item" and peel(term.parts[0]).called in ("full", "full_like"):
            waiting.append(term.parts[0])
        elif term.op == "call" and term.called in ("sum", "all_reduce", "fsum"):
            waiting.extend(term.parts[:1])


def _plausible(term: Term) -> bool:
    value = term.constant()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or is_log_two(term):
        return False
    return 1.5 <= value <= 8.0 or 0.125 <= value <= 0.66 or 1e6 < value < math.inf
