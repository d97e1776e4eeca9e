"""Slots: a folder of techniques, and the folder is the registry.

A technique is looked up by importing the module of its name, so that a new file is all it takes; the folder is listed
only to answer a misspelling (an exported script has no folder to list).
"""

import importlib
import pkgutil
import re
from difflib import get_close_matches
from types import ModuleType

from fairway.base.errors import RecipeError

_NAME = re.compile(r"[a-z0-9_]+")


def technique(folder: str, kind: str, place: str | None = None) -> ModuleType:
    """The module of technique `kind` in the slot `folder` (a dotted package name).

    Raises RecipeError naming `place`, the value and the nearest choices when there is no such technique.
    """
    place = place or folder.rsplit(".", 1)[-1]
    module_name = f"{folder}.{kind}"
    if _NAME.fullmatch(kind):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise RecipeError(
                    f"{place} = {kind!r} needs the package {error.name!r}: pip install {error.name}"
                ) from error
        else:
            if hasattr(module, "Spec"):
                return module
    known = kinds(folder)
    near = get_close_matches(kind, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise RecipeError(f"{place} = {kind!r}: no such technique{hint}; choices: {', '.join(known)}")


def kinds(folder: str) -> list[str]:
    """The names of all techniques in a slot folder, sorted."""
    package = importlib.import_module(folder)
    return sorted(i.name for i in pkgutil.iter_modules(package.__path__) if _is_technique(f"{folder}.{i.name}"))


def _is_technique(module_name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module_name), "Spec")
    except ModuleNotFoundError:  # it wants a package that is not installed here: `technique` says which
        return True


def kind_of(spec: object) -> str:
    """The name of the technique that a Spec belongs to: the last part of its module's name."""
    return type(spec).__module__.rsplit(".", 1)[-1]


def module_of(spec: object) -> ModuleType:
    """The technique's module, from an instance of its Spec."""
    return importlib.import_module(type(spec).__module__)
