"""Slots: a folder of techniques, and the folder is the registry.

A technique is looked up by importing the module of its name, so that a new file is all it takes; the folder is listed
only to answer a misspelling (an exported script has no folder to list).
"""

import importlib
import re
from types import ModuleType

from fairway.base.choices import kinds
from fairway.base.errors import RecipeError

__all__ = ["kind_of", "kinds", "module_of", "optional", "technique"]

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
    if not list(importlib.import_module(folder).__path__):  # a script: it holds what its recipe names
        optional(module_name)
    unknown: RecipeError = optional("fairway.base.choices").unknown(folder, kind, place)
    raise unknown


def optional(name: str) -> ModuleType:
    """A module that only some recipes need, which its own `wanted` says of a recipe's plain table: an exported script
    holds it where its recipe does. RecipeError in one that does not."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise RecipeError(f"{name}: this script was exported for a recipe without it; export it anew") from error


def kind_of(spec: object) -> str:
    """The name of the technique that a Spec belongs to: the last part of its module's name."""
    return type(spec).__module__.rsplit(".", 1)[-1]


def module_of(spec: object) -> ModuleType:
    """The technique's module, from an instance of its Spec."""
    return importlib.import_module(type(spec).__module__)
