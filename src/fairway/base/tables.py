"""Plain tables (what TOML or JSON can hold) as text and as a hash. Standard library alone: it travels in a script."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def sha256(table: Any) -> str:
    """A stable hash of a resolved recipe's plain table."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def dump(table: Mapping[str, Any]) -> str:
    """TOML text of a plain table; None (a key left at "not set") is left out, as TOML has no word for it."""
    lines: list[str] = []
    _dump(table, "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump(table: Mapping[str, Any], place: str, lines: list[str]) -> None:
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{key} = {_literal(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            where = f"{place}.{_key(key)}" if place else _key(key)
            lines += ["", f"[{where}]"]
            _dump(value, where, lines)


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, float) and value != value:
        return "nan"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML wants DEL escaped, JSON does not
