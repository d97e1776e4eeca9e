"""Settings that a script reads from a JSON file of its folder, as terms: as if it had written them out."""

from typing import TYPE_CHECKING, Any

from fairway.audit.beside import table_of, text_at
from fairway.audit.settings import UNKNOWN
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import constant

if TYPE_CHECKING:
    from fairway.audit.terms.calls import Here
    from fairway.audit.terms.machine import Machine


def loaded(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """json.load(file), json.loads(text), where the text is known."""
    if not positional:
        return None
    text = _content(m, positional[0]) if name.endswith("load") else _text(m, positional[0])
    table = UNKNOWN if text is None else table_of(text)
    return None if table is UNKNOWN else _spelt(table, here)


def _text(m: "Machine", term: Term) -> str | None:
    if term.op == "call" and term.called in ("read", "read_text"):
        below = term.operand()
        return _content(m, below) if below is not None else None
    text = term.constant()
    return text if isinstance(text, str) else None


def _content(m: "Machine", term: Term) -> str | None:
    """What lies in a file that was opened, or under a path."""
    below = term.operand() if term.op == "call" and term.called in ("open", "Path") else term
    if below is not term:
        return _content(m, below) if below is not None else None
    return text_at(m.settings.tables, term.constant())


def _spelt(told: Any, here: "Here") -> Term:
    if isinstance(told, dict):
        pairs = [part for key, each in told.items() for part in (_spelt(key, here), _spelt(each, here))]
        return Term("dict", tuple(pairs), None, here.file, here.line)
    if isinstance(told, list):
        return Term("list", tuple(_spelt(each, here) for each in told), None, here.file, here.line)
    return constant(told, here.file, here.line)
