"""What a log prints before the first step: the script's source, and tables of settings on one line (JSON, or what
Python prints of a dict)."""

import ast
import json
import re
from typing import Any

_RULE = re.compile(r"={40,}$")
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


def source_end(rows: list[str]) -> int:
    """The line of `=` that closes the source at the head; 0 where there is none."""
    for number, row in enumerate(rows[:6_000], 1):
        if _RULE.match(row.strip()) and number > 20:
            head = rows[: number - 1]
            return number if any(line.startswith(("import ", "from ", "def ", "exec")) for line in head) else 0
    return 0
