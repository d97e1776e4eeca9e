"""Recipes: TOML files of small differences. One parent by `extends`, single values by `--set a.b=c`.

The only module of the house that knows the checking library (pydantic): the rest travels in an exported script.
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError

from fairway.base.errors import RecipeError
from fairway.base.specs import build, plain_leaf
from fairway.base.tables import dump, sha256

__all__ = ["check", "dump", "finish", "lineage", "load", "merge", "read", "sha256"]

R = TypeVar("R")


def load(cls: type[R], path: Path, overrides: Iterable[str] = ()) -> R:
    """The recipe at `path`, its parent's values beneath, `overrides` ("a.b=value") on top, checked against `cls`.

    Raises RecipeError naming the key, its place and the nearest right one.
    """
    return finish(cls, read(path), path.stem, overrides)


def finish(cls: type[R], table: dict[str, Any], name: str, overrides: Iterable[str] = ()) -> R:
    """A recipe from its merged table, `overrides` on top; `name` where the table gives none."""
    for override in overrides:
        table = merge(table, _override(override))
    table.setdefault("name", name)
    return check(cls, table)


def check(cls: type[R], table: Mapping[str, Any]) -> R:
    """A spec of class `cls` from a plain table, every type checked."""
    return build(cls, table, leaf=_leaf)


def read(path: Path) -> dict[str, Any]:
    """The merged table of a recipe file and its ancestors."""
    merged: dict[str, Any] = {}
    for _, difference in lineage(path):
        merged.pop("name", None)
        merged = merge(merged, difference)
    return merged


def lineage(path: Path, _seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe file and its ancestors, the eldest first: each with its own difference from the one before."""
    path = path.resolve()
    if path in _seen:
        raise RecipeError(f"{path.name}: extends itself through {' -> '.join(p.name for p in _seen)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file; `fairway list recipes` shows those at hand") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    parent = table.pop("extends", None)
    if parent is None:
        return [(path, table)]
    if not isinstance(parent, str):
        raise RecipeError(f"{path.name}: extends = {parent!r}: one parent's file name is expected")
    return [*lineage(path.parent / parent, (*_seen, path)), (path, table)]


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table. Another `kind` of technique replaces the whole table."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, str) and isinstance(old, Mapping) and old.get("kind") == value:
            continue
        if isinstance(value, Mapping) and isinstance(old, str) and value.get("kind", old) == old:
            old = {"kind": old}
        if (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _override(text: str) -> dict[str, Any]:
    key, separator, raw = text.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"--set {text!r}: write key=value, as in --set train.lr=0.02")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string, so that nobody has to quote twice in a shell
    table: dict[str, Any] = {}
    leaf = table
    *parents, last = key.strip().split(".")
    for parent in parents:
        leaf = leaf.setdefault(parent, {})
    leaf[last] = value
    return table


def _leaf(value: Any, annotation: Any, place: str) -> Any:
    if isinstance(value, list):
        value = _tuples(value)
    if isinstance(value, int) and not isinstance(value, bool) and annotation is float:
        value = float(value)
    if get_origin(annotation) is Literal:  # pydantic takes True for 1 here
        return plain_leaf(value, annotation, place)
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        inner = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        raise RecipeError(f"{place}{inner} = {value!r}: {first['msg']}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
