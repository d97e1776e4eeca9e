"""Notebooks: the code cells joined to one script, with the line of the .ipynb file that each line stands in."""

import json
from typing import Any

from fairway.audit.reading.script import Gap


def joined(raw: str) -> tuple[str, tuple[int, ...]] | Gap:
    """The script that running all cells would run; shell and line magics become `pass`."""
    try:
        book = json.loads(raw)
        cells = [cell["source"] for cell in _cells(book) if cell.get("cell_type") == "code"]
    except json.JSONDecodeError as error:
        return Gap(error.lineno, f"a notebook that is no JSON: {error.msg}")
    except (RecursionError, KeyError, TypeError, AttributeError):
        return Gap(1, "a notebook without cells that can be read")
    rows: list[str] = []
    lines: list[int] = []
    at, line = 0, 1
    for cell in cells:
        source = "".join(str(part) for part in cell) if isinstance(cell, list) else str(cell)
        for shown, original in zip(_plain(source.split("\n")), source.split("\n"), strict=True):
            found = _where(raw, original, at)
            if found >= 0:
                line += raw.count("\n", at, found)
                at = found
            rows.append(shown)
            lines.append(line)
    return "\n".join(rows), tuple(lines)


def _cells(book: Any) -> list[Any]:
    """All cells; before format 4 they lay in worksheets, under `input`."""
    if "cells" in book:
        return list(book["cells"])
    sheets = [cell for sheet in book["worksheets"] for cell in sheet["cells"]]
    return [{**cell, "source": cell.get("input", "")} for cell in sheets]


def _plain(rows: list[str]) -> list[str]:
    """A cell's lines without magics; one in another language is left out, one that writes a script is that script."""
    first = rows[0].strip() if rows else ""
    if first.startswith("%%"):
        keep = first.split()[0] in ("%%time", "%%timeit", "%%capture", "%%prun") or first.endswith(".py")
        return ["pass"] + [row if keep else "" for row in rows[1:]]
    return [_without_magic(row) for row in rows]


def _without_magic(row: str) -> str:
    bare = row.lstrip()
    if bare.startswith(("%", "!")) or (bare.startswith("?") and bare):
        return row[: len(row) - len(bare)] + "pass"
    return row


def _where(raw: str, row: str, at: int) -> int:
    """Where a line of a cell stands in the file, from `at` on; -1 where it is empty or not found."""
    if not row.strip():
        return -1
    for ascii_only in (False, True):
        found = raw.find(json.dumps(row, ensure_ascii=ascii_only)[1:-1], at)
        if found >= 0:
            return found
    return -1
