"""Tables of settings that a log prints on one line: JSON, or what Python prints of a dict."""

import ast
import json
from typing import Any

_FEWEST = 6  # settings: a smaller table is a result


def table_in(row: str) -> dict[str, Any]:
    """The table of six settings or more that stands in a line; empty where none does."""
    start = row.find("{")
    if start < 0:
        return {}
    try:
        found = json.JSONDecoder().raw_decode(row, start)[0]
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(row[start : row.rfind("}") + 1])
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return {}
    told = isinstance(found, dict) and all(isinstance(key, str) for key in found)
    return found if told and len(leaves(found)) >= _FEWEST else {}


def leaves(table: dict[str, Any]) -> dict[str, Any]:
    """name -> value of all that is no table itself; where two tables have one name, `table.name` for the later one."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            inner = leaves({str(name): each for name, each in value.items()})
            for name, each in inner.items():
                found[name if name not in found else f"{key}.{name}"] = each
        elif value is None or isinstance(value, (str, int, float, bool)):
            found[key] = value
    return found
