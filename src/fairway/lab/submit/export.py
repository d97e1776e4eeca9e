"""The house as two scripts: `train_gpt.py`, text to score, and `score.py`, the decoder's side alone.

Both hold what the recipe needs and nothing else; its seed stays out, so that all seeds of a recipe have one script.
"""

import importlib.metadata
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import fairway
from fairway.artifact.bundle import Closure, closure, imported, packed, unpacked
from fairway.base import files, slots, tables
from fairway.base.errors import ContractError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.doctor import git_commit
from fairway.recipe import Recipe

TRAIN, SCORE = "train_gpt.py", "score.py"
HOUSE = Path(fairway.__file__).parent


@dataclass(frozen=True)
class Checkout:
    """The code of a run: the package as it lies here. commit: None where it is no git checkout."""

    commit: str | None
    sha256: str

    def describe(self) -> dict[str, str | None]:
        return {"commit": self.commit, "sha256": self.sha256}

    def write(self, recipe: Recipe, run: Run) -> dict[str, Path]:
        """Both scripts, in the run folder; one that is there with these bytes is left alone."""
        written = {}
        for role, (name, script) in scripts(recipe).items():
            path = written[role] = run.path(name)
            if not path.exists() or path.read_bytes() != script:
                files.write(path, script)
        return written


def checkout() -> Checkout:
    """This package: the commit, and one hash over every Python file of it."""
    return Checkout(git_commit(HOUSE), house_sha256(HOUSE))


def house_sha256(house: Path) -> str:
    """One hash over every Python file of a package's folder, by its place in it."""
    listed = sorted(house.rglob("*.py"))
    return tables.sha256([[path.relative_to(house).as_posix(), files.sha256(path)] for path in listed])


def scripts(recipe: Recipe) -> dict[str, tuple[str, bytes]]:
    """{what it does: (name, content)} of both scripts."""
    return {"train": (TRAIN, train_script(recipe)), "score": (SCORE, score_script(recipe))}


def train_script(recipe: Recipe) -> bytes:
    """All of it, for every seed of a recipe."""
    table = {key: value for key, value in lean(recipe).items() if key != "seed"}
    if build(Recipe, {**table, "seed": recipe.seed}) != recipe:
        raise ContractError(f"{recipe.name}: what differs from the defaults does not make the recipe again")
    title = (
        f"{recipe.name}: trains, quantises, packs and scores. torchrun --nproc_per_node=8 {TRAIN}, or python {TRAIN}"
    )
    return _script("fairway.script.training:main", techniques(recipe), to_plain(recipe), table, TRAIN, title)


def score_script(recipe: Recipe) -> bytes:
    """The decoder and the scorer."""
    used = [recipe.model, recipe.pack, recipe.score]
    kinds = {kind for spec in used for kind in techniques(spec)} | {type(recipe.data.source).__module__}
    data = recipe.data
    source = {"kind": slots.kind_of(data.source), **to_plain(data.source)}
    table = {"source": source, "path": data.path, "lossy": data.lossy, "held_out": data.held_out}
    title = f"{recipe.name}: python {SCORE} ARTIFACT [TEXT] [--data FOLDER]"
    share = {room: value for room, value in to_plain(recipe).items() if room != "train"}
    return _script("fairway.script.scoring:main", kinds, share, table, SCORE, title)


def lean(spec: Any) -> dict[str, Any]:
    """The plain table of a spec without what its class says by default: 1 KB less in a script."""
    table: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value == default and type(value) is type(default):
            continue
        if field.metadata.get("many"):
            table[field.name] = [{"kind": slots.kind_of(one), **lean(one)} for one in value]
        elif "slot" in field.metadata:
            table[field.name] = {"kind": slots.kind_of(value), **lean(value)}
        else:
            table[field.name] = lean(value) if is_dataclass(value) else to_plain(value)
    return table


def techniques(spec: Any) -> set[str]:
    """The dotted modules of all techniques in a resolved spec."""
    found: set[str] = set()
    if is_dataclass(spec) and not isinstance(spec, type):
        for field in fields(spec):
            value = getattr(spec, field.name)
            if "slot" in field.metadata:
                found |= {type(one).__module__ for one in (value if field.metadata.get("many") else (value,))}
            found |= techniques(value)
    elif isinstance(spec, Mapping):
        found.update(*map(techniques, spec.values()))
    elif isinstance(spec, tuple | list):
        found.update(*map(techniques, spec))
    return found


def needs(script: str) -> frozenset[str]:
    """The packages beyond the standard library that a script imports, by their first names."""
    return _beyond(imported(unpacked(script)[1].values()))


def requirements(packages: frozenset[str]) -> list[str]:
    """What pip installs for some imports, one line each, in the versions of this machine."""
    providers = importlib.metadata.packages_distributions()
    asked = {re.match(r"[\w.-]+", line)[0].lower() for line in importlib.metadata.requires("fairway") or []}  # type: ignore[index]
    lines = set()
    for name in packages:
        found = set(providers.get(name, [name]))  # of a namespace package several, of which we ask for one
        for distribution in {one for one in found if one.lower() in asked} or found:
            lines.add(f"{distribution}=={importlib.metadata.version(distribution).partition('+')[0]}")
    return sorted(lines, key=str.lower)


def _beyond(packages: frozenset[str]) -> frozenset[str]:
    # compression: zstd's place from Python 3.14 on; triton comes with torch where there is CUDA, else nothing needs it
    return packages - set(sys.stdlib_module_names) - {"compression", "fairway", "triton"}


def _script(entry: str, kinds: set[str], share: dict[str, Any], table: dict[str, Any], name: str, title: str) -> bytes:
    """share: of the recipe's plain table, what optional modules are asked with; table: what the entry is given."""
    found: Closure = closure(HOUSE.parent, entry, kinds, lambda one: bool(slots.optional(one).wanted(share)))
    if banned := _beyond(found.foreign) & {"pydantic", "typer", "rich", "matplotlib"}:
        raise ContractError(f"{name}: needs {min(banned)}, which does not travel; import it on the people's side alone")
    return packed(found.modules, table, entry, name, title).encode()
