"""What a slot offers, its folder listed; and what was meant, where a name is misspelled."""

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fairway.base.errors import RecipeError


def wanted(recipe: Mapping[str, Any]) -> bool:
    """A script has no folders to list."""
    return False


def unknown(folder: str, kind: str, place: str) -> RecipeError:
    """The error for a technique that the slot does not have, with the nearest one that it has."""
    known = kinds(folder)
    near = get_close_matches(kind, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return RecipeError(f"{place} = {kind!r}: no such technique{hint}; choices: {', '.join(known)}")


def unknown_key(place: str, key: str, known: list[str]) -> RecipeError:
    """The error for a key that a table does not have, with the nearest one that it has."""
    near = get_close_matches(key, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(known)}"
    return RecipeError(f"{place}: unknown key{hint}")


def kinds(folder: str) -> list[str]:
    """The names of all techniques in a slot folder, sorted."""
    package = importlib.import_module(folder)
    return sorted(i.name for i in pkgutil.iter_modules(package.__path__) if _is_technique(f"{folder}.{i.name}"))


def _is_technique(module_name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module_name), "Spec")
    except ModuleNotFoundError:  # it wants a package that is not installed here: `technique` says which
        return True
