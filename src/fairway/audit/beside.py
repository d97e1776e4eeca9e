"""Tables of settings that lie beside a script as JSON files, for the script that reads them.

text_at(texts, path)    the text of the file that a path in a script or a command means, or None
table_of(text)          the table that a JSON text spells, or UNKNOWN
table_at(texts, path)   the table in that file, or UNKNOWN
"""

import json
import posixpath
from collections.abc import Mapping
from typing import Any

from fairway.audit.settings import UNKNOWN

BYTES = 64_000  # a table of settings has a few thousand; what is larger is data
_ENTRIES = 64  # of one list in it: layers, betas, seeds; a longer one is data
_DEPTH = 6


def text_at(texts: Mapping[str, str], path: Any) -> str | None:
    """The file of the folder that a path means, whether it is told from the folder or from further up."""
    if not isinstance(path, str) or not path:
        return None
    plain = posixpath.normpath(path).lstrip("/")
    if plain in texts:
        return texts[plain]
    return next((text for name, text in texts.items() if plain.endswith("/" + name)), None)


def table_of(text: str) -> Any:
    """A table of numbers, texts and short lists of them; UNKNOWN for another text, and for one that holds data."""
    if len(text) > BYTES:
        return UNKNOWN
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return UNKNOWN
    return found if isinstance(found, dict) and _is_told(found, _DEPTH) else UNKNOWN


def table_at(texts: Mapping[str, str], path: Any) -> Any:
    """The table that lies in the file that a path means; UNKNOWN where none does."""
    text = text_at(texts, path)
    return UNKNOWN if text is None else table_of(text)


def _is_told(value: Any, deep: int) -> bool:
    if isinstance(value, (dict, list)):
        held = list(value.values()) if isinstance(value, dict) else value
        short = isinstance(value, dict) or len(value) <= _ENTRIES
        return deep > 0 and short and all(_is_told(each, deep - 1) for each in held)
    return True
