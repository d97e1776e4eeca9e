"""Helper modules, kernels or a decoder outside the script, in no sum."""

import ast
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.reading import Script
from fairway.audit.records import record_of
from fairway.audit.verdict import Finding, Place, Step

ID = "uncounted-code"
CHARGE = "Code outside the counted script is executed."
CLAUSE = "R1: all counted code lives in train_gpt.py; (c) code not counted"
WITHOUT_SCRIPT = False

_SOURCES = (".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".so", ".pyx", ".pyc", ".sh", ".whl")


def check(case: Case) -> Finding:
    """Violates where files of the folder hold code that the entry executes and that no sum counts."""
    record = record_of(case.submission)
    outside = {**record.neighbours, **_named_sources(case)}
    if not outside:
        return _absent(case) or Finding(ID, "clean", "everything that is executed stands in the script itself", CLAUSE)
    spent = sum(outside.values())
    names = ", ".join(f"{path} ({size:,} bytes)" for path, size in sorted(outside.items()))
    counted = [amount.value for log in record.logs for amount in log.codes] + [record.claims.code or 0.0]
    if max(counted) >= record.code_bytes + spent or _counts_itself(case, outside):
        return Finding(ID, "clean", f"code outside the script is counted: {names}", CLAUSE)
    place, step = _used(case.script, outside)
    evidence = (
        f"{step.what}: {names} is executed and counted in no sum; R1 counts all code, which should live in one script"
    )
    return Finding(ID, "violates", evidence, CLAUSE, place, (step,))


def _named_sources(case: Case) -> dict[str, int]:
    """Sources in other languages and programs of the folder that the code names."""
    texts = {node.value for script in case.script.all() if script.tree for node in _strings(script.tree)}
    files = {path: size for path, size in case.submission.sizes.items() if path.lower().endswith(_SOURCES)}
    return {path: size for path, size in files.items() if any(_names(text, path) for text in texts)} if texts else {}


def _names(text: str, path: str) -> bool:
    """Whether a string of the code is this file's name, alone or at the end of a path."""
    return len(text) < 300 and (text.rpartition("/")[2] == path.rpartition("/")[2])


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _counts_itself(case: Case, outside: dict[str, int]) -> bool:
    """Whether the script weighs these files: a length or a size is taken of something that names each of them."""
    weighed = [node for script in case.script.all() if script.tree for node in ast.walk(script.tree) if _weighs(node)]
    named = {text.value for node in weighed for text in _strings(node)}
    return all(any(_names(name, path) or name == "*.py" for name in named) for path in outside)


def _weighs(node: ast.AST) -> bool:
    """A sum of code's bytes: `sum(...)` or `len(...)` of files that are read or asked for their size."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in ("sum", "len"):
        return False
    words = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return bool(words & {"read_bytes", "read_text", "st_size", "getsize", "read", "stat"})


def _used(script: Script, outside: dict[str, int]) -> tuple[Place, Step]:
    """Where the code outside is first executed."""
    how = {"exec": "executes the text of", "import": "imports", "run": "runs"}
    for each in script.all():
        for layer in each.layers:
            if layer.script.path in outside:
                place = Place(each.path, each.line(layer.line))
                return place, Step(place, f"{each.path} {how[layer.how]} {layer.script.path}")
        for node in _strings(each.tree) if each.tree else ():
            path = next((path for path in outside if _names(node.value, path)), None)
            if path:
                place = Place(each.path, each.line(node.lineno))
                return place, Step(place, f"{each.path} names {path}")
    place = Place(script.path)
    return place, Step(place, f"{script.path} reaches {', '.join(outside)}")


def _absent(case: Case) -> Finding | None:
    """A script that only starts another one, which was not handed in."""
    script = case.script
    for gap in script.opaque:
        if "not in the folder" in gap.why or (script.text.count("\n") < 20 and "open(" in gap.why):
            evidence = (
                f"{gap.why[:1].upper()}{gap.why[1:]}: the code that runs stands in another file than the counted one"
            )
            return Finding(ID, "suspect", evidence, CLAUSE, Place(script.path, script.line(gap.line)))
    return None
