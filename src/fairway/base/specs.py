"""Specs: frozen dataclasses built from plain tables, and turned back into them.

A field made by `choice(folder, default)` holds the Spec of one technique of a slot: in a recipe either its name
(`attention = "exclusive"`) or a table with `kind` and the technique's own keys. `choices` holds several, in order.
Nothing here needs more than the standard library: the decoder builds its model from an artifact's header with it.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fairway.base import slots
from fairway.base.errors import RecipeError

S = TypeVar("S")
Leaf = Callable[[Any, Any, str], Any]
"""(value, annotation, place) -> the checked value; raises RecipeError."""


def choice(folder: str, default: str | Mapping[str, Any]) -> Any:
    """A dataclass field that holds the Spec of one technique of the slot `folder`."""
    return dataclasses.field(
        default_factory=lambda: _technique(folder, default, folder, plain_leaf), metadata={"slot": folder}
    )


def choices(folder: str, default: tuple[str | Mapping[str, Any], ...] = ()) -> Any:
    """A dataclass field that holds a tuple of Specs of the slot `folder`, in order."""
    return dataclasses.field(
        default_factory=lambda: tuple(_technique(folder, value, folder, plain_leaf) for value in default),
        metadata={"slot": folder, "many": True},
    )


def build(cls: type[S], table: Any, place: str = "", leaf: Leaf | None = None) -> S:
    """An instance of the dataclass `cls` from a plain table. Unknown keys, wrong types and values that the Spec's own
    `__post_init__` refuses (ValueError) raise RecipeError with the place in dotted form."""
    leaf = leaf or plain_leaf
    if not isinstance(table, Mapping):
        raise RecipeError(f"{place or cls.__name__} = {table!r}: a table is expected")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{place}.{key}" if place else str(key)
        if key not in fields:
            unknown: RecipeError = slots.optional("fairway.base.choices").unknown_key(where, str(key), list(fields))
            raise unknown
        values[key] = _value(fields[key], hints[key], value, where, leaf)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{place or cls.__name__}: {missing[0]} is missing and has no default")
    try:
        return cls(**values)
    except ValueError as error:
        raise RecipeError(f"{place + ': ' if place else ''}{error}") from error


def to_plain(spec: Any) -> Any:
    """The plain table of a spec: what TOML or JSON can hold, and what `build` reads back to an equal spec."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        table: dict[str, Any] = {}
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if field.metadata.get("many"):
                table[field.name] = [{"kind": slots.kind_of(item), **to_plain(item)} for item in value]
            elif "slot" in field.metadata:
                table[field.name] = {"kind": slots.kind_of(value), **to_plain(value)}
            else:
                table[field.name] = to_plain(value)
        return table
    if isinstance(spec, Mapping):
        return {key: to_plain(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return [to_plain(item) for item in spec]
    return spec


def plain_leaf(value: Any, annotation: Any, place: str) -> Any:
    """Checks a leaf with the standard library alone (recipes use a stricter, better-worded check)."""
    if annotation is Any:
        return value
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return plain_leaf(value, option, place)
            except RecipeError:
                continue
        raise RecipeError(f"{place} = {value!r}: expected {annotation}")
    if origin is typing.Literal:
        if any(value == known and type(value) is type(known) for known in arguments):  # True is not 1
            return value
        raise RecipeError(f"{place} = {value!r}; choices: {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(plain_leaf(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value))
        if len(value) == len(arguments):
            return tuple(plain_leaf(item, arguments[i], f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {
            plain_leaf(key, arguments[0], place): plain_leaf(item, arguments[1], f"{place}.{key}")
            for key, item in value.items()
        }
    if annotation is None or annotation is types.NoneType:
        if value is None:
            return None
    elif annotation is float and (type(value) is float or (type(value) is int and abs(value) < 1 << 1023)):
        return float(value)
    elif isinstance(annotation, type) and type(value) is annotation:
        return value
    raise RecipeError(f"{place} = {value!r}: expected {getattr(annotation, '__name__', annotation)}")


def _value(field: "dataclasses.Field[Any]", hint: Any, value: Any, place: str, leaf: Leaf) -> Any:
    folder: str = field.metadata.get("slot", "")
    if field.metadata.get("many"):
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{place} = {value!r}: a list of techniques is expected")
        return tuple(_technique(folder, item, f"{place}[{i}]", leaf) for i, item in enumerate(value))
    if folder:
        return _technique(folder, value, place, leaf)
    return _typed(hint, value, place, leaf)


def _typed(hint: Any, value: Any, place: str, leaf: Leaf) -> Any:
    """A value of a plain annotation, which may hold Specs: X, X | None, tuple[X, ...], dict[str, X]."""
    if _is_spec(hint):
        return build(hint, value, place, leaf)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and _is_spec(arguments[1]):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{place} = {value!r}: a table is expected")
        return {key: build(arguments[1], item, f"{place}.{key}", leaf) for key, item in value.items()}
    if origin is tuple and _is_spec(arguments[0]):
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{place} = {value!r}: a list of tables is expected")
        return tuple(build(arguments[0], item, f"{place}[{i}]", leaf) for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType) and any(map(_is_spec, arguments)):
        return None if value is None else build(next(filter(_is_spec, arguments)), value, place, leaf)
    return leaf(value, hint, place)


def _is_spec(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _technique(folder: str, value: Any, place: str, leaf: Leaf) -> Any:
    if isinstance(value, str):
        kind, table = value, {}
    elif isinstance(value, Mapping) and isinstance(value.get("kind"), str):
        kind, table = value["kind"], {key: item for key, item in value.items() if key != "kind"}
    else:
        raise RecipeError(f"{place} = {value!r}: a technique's name, or a table with `kind`, is expected")
    return build(slots.technique(folder, kind, place).Spec, table, place, leaf)
