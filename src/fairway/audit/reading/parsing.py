"""Text -> tree within bounds of size and depth, or the line and the reason why there is none."""

import ast
import re
import warnings
from collections.abc import Iterator

from fairway.audit.reading import bounds
from fairway.audit.reading.dicts import as_objects
from fairway.audit.reading.script import Gap

_STRINGS = re.compile(
    r'''"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'''
    r"""'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''|'[^'\\\n]*(?:\\.[^'\\\n]*)*'""",
    re.DOTALL,
)
_LEAVES = (ast.Constant, ast.Load, ast.Store, ast.Del)
_PYTHON_2 = (
    "Missing parentheses in call to",
    "multiple exception types must be parenthesized",
    "leading zeros in decimal integer literals",
)
_OLD_WORDS = re.compile(r"<>|^\s*print\s+[^=(\s.]|^\s*exec\s+[\"']|^\s*raise\s+\w+\s*,|\bur[\"']|`[^`]*`\s*$")


def parsed(text: str) -> ast.Module | Gap:
    """The tree of a script."""
    code = sum(map(len, _STRINGS.split(text))) if len(text) > bounds.CODE_CHARACTERS else len(text)
    if code > bounds.CODE_CHARACTERS:
        return Gap(_longest(text), f"{code:,} characters of code, and at most {bounds.CODE_CHARACTERS:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes: the submission's business
            tree = ast.parse(text)
    except SyntaxError as error:
        return _refused(text, error)
    except (RecursionError, MemoryError):
        return Gap(_deepest(text), "nested too deeply to be parsed")
    except (ValueError, OverflowError) as error:
        return Gap(_longest(text), f"cannot be parsed: {error}")
    return _too_deep(tree) or as_objects(tree)


def _refused(text: str, error: SyntaxError) -> Gap:
    line = error.lineno or _deepest(text)
    said = (error.msg or "invalid syntax").split("\n")[0]
    if "too many nested" in said or "too many statically nested" in said or "levels of indentation" in said:
        return Gap(line, "nested too deeply to be parsed")
    rows = text.split("\n")
    shown = rows[line - 1] if 0 < line <= len(rows) else ""
    old = said.startswith(_PYTHON_2) or bool(_OLD_WORDS.search(shown))
    return Gap(line, f"Python 2 text, which is not read: {said}" if old else f"not Python 3: {said}")


def _too_deep(tree: ast.Module) -> Gap | None:
    """The first place below the depth that rules may walk, found without recursion."""
    for depth, level in enumerate(levels(tree)):
        if depth == bounds.TREE_DEPTH:
            line = next((node.lineno for node in level if hasattr(node, "lineno")), 0)
            return Gap(line, f"nested more than {bounds.TREE_DEPTH} levels deep")
    return None


def levels(tree: ast.AST) -> Iterator[list[ast.AST]]:
    """The nodes of a tree level by level, without constants: a table of 200,000 numbers is one node."""
    level = [tree]
    while level:
        yield level
        below: list[ast.AST] = []
        for node in level:
            for value in vars(node).values():
                if isinstance(value, list):
                    below += [each for each in value if isinstance(each, ast.AST) and type(each) is not ast.Constant]
                elif isinstance(value, ast.AST) and type(value) not in _LEAVES:
                    below.append(value)
        level = below


def _longest(text: str) -> int:
    rows = text.split("\n")
    return max(range(len(rows)), key=lambda row: len(rows[row])) + 1


def _deepest(text: str) -> int:
    """The line in which most brackets stand open; the longest where that says nothing."""
    depth, most, found = 0, 0, 0
    for number, row in enumerate(text[: bounds.CODE_CHARACTERS].split("\n"), 1):
        for sign in row:
            depth += (sign in "([{") - (sign in ")]}")
            if depth > most:
                most, found = depth, number
    return found if most > 20 else _longest(text)
