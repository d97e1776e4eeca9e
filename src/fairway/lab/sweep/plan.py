"""The plan of a sweep: recipes and seeds -> fully resolved runs, each with an id that stays.

An id is a hash of what the resolved recipe says beyond the defaults (its name, its seed, all else but the summary): a
new key whose default changes nothing makes no finished run a stranger. Two things are asked of a recipe's first seed
alone, since they cost about 25 s a run and say the same for every seed: the proof (`proof_bytes`) and the compressors
beside the score (`baselines`). On the other seeds both are off; that stands in the resolved recipe, and hence in the
id.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fairway import recipe as recipe_files
from fairway.base import tables
from fairway.base.errors import RecipeError
from fairway.base.recipes import lineage
from fairway.base.specs import to_plain
from fairway.lab.submit.export import lean
from fairway.recipe import Recipe

ONES_OWN = ("seed", "proof_bytes", "baselines", "summary")  # what the runs of one approach may differ in
ID_DIGITS = 10  # 40 bits: a clash among a thousand runs has a chance of one in two million
BASELINES = {  # folders whose sweeps take these along, from the folder above
    "approaches": ("b.toml", "b6.toml"),
    "findings": ("b6.toml",),
    "repairs": ("b6.toml",),
}


@dataclass(frozen=True)
class Approach:
    """One recipe of a sweep. parent: the name of the recipe it extends; baseline: the others are held against it."""

    recipe: Recipe
    parent: str | None
    baseline: bool


@dataclass(frozen=True)
class Planned:
    """One run, as a line of plan.jsonl has it. approach: a hash of what all seeds of its recipe share; sha256: of its
    whole resolved table, as the run folder's journal has it."""

    id: str
    recipe: str
    seed: int
    approach: str
    sha256: str
    parent: str | None
    baseline: bool

    @property
    def folder(self) -> str:
        return f"{self.recipe}-{self.seed}-{self.id}"


def approaches(sources: Sequence[str], overrides: tuple[str, ...] = (), form: str = "") -> list[Approach]:
    """The recipes of a sweep, loaded and checked. sources: folders, of which every .toml is taken, files and names.

    Baselines are the files named beside a folder, or the first where only files are named; with the folder
    `approaches` also b and b6 above it, with `findings` and `repairs` b6. RecipeError where a source holds no recipe,
    or two recipes have one name.
    """
    folders = [Path(source) for source in sources if Path(source).is_dir()]
    beside = [recipe_files.find(source) for source in sources if not Path(source).is_dir()]
    homes = [(folder.resolve().parent, BASELINES.get(folder.resolve().name, ())) for folder in folders]
    beside = [*filter(Path.exists, (home / name for home, names in homes for name in names)), *beside]
    inside = [path for folder in folders for path in _recipes(folder)]
    baselines = {path.resolve() for path in (beside if folders else beside[:1])}
    found: dict[Path, Approach] = {}
    named: dict[str, Path] = {}
    for path in map(Path.resolve, [*beside, *inside]):
        if path in found:
            continue
        loaded = recipe_files.load(str(path), overrides, form)
        if loaded.name in named:
            raise RecipeError(f"{path}: called {loaded.name!r}, as {named[loaded.name]} is; give one another `name`")
        named[loaded.name] = path
        found[path] = Approach(loaded, _parent(path, form), path in baselines)
    if not found:
        raise RecipeError("fairway sweep: name a folder of recipes, or recipes")
    return list(found.values())


def plan(
    chosen: Sequence[Approach], seeds: Sequence[int], known: Iterable[Planned] = ()
) -> list[tuple[Planned, Recipe]]:
    """Every (recipe, seed), fully resolved. known: what was planned before; those runs keep their ids, whichever seed
    is named first now. seeds: none is the recipe's own."""
    first: dict[str, int] = {}
    for one in known:
        first.setdefault(one.approach, one.seed)
    planned: dict[str, tuple[Planned, Recipe]] = {}
    # Seed by seed: of a sweep that is killed, or still on its way, every approach has its first seed before one has
    # its second, so that the table is whole early and only its error bars are missing.
    for place in range(max(len(seeds), 1)):
        for approach in chosen:
            seed = seeds[place] if seeds else approach.recipe.seed
            shared = _shared(approach.recipe)
            resolved = replace(approach.recipe, seed=seed)
            if first.setdefault(shared, seed) != seed:
                resolved = replace(resolved, proof_bytes=0, baselines=False)
            sha256 = tables.sha256(to_plain(resolved))
            name = tables.sha256({k: v for k, v in lean(resolved).items() if k != "summary"})[:ID_DIGITS]
            one = Planned(name, resolved.name, seed, shared, sha256, approach.parent, approach.baseline)
            planned[name] = one, resolved
    return list(planned.values())


def folder_name(sources: Sequence[str], form: str) -> str:
    """sweep-<name>[-<form>]: the name is the folder's, or the recipes' joined."""
    folders = [Path(source).resolve().name for source in sources if Path(source).is_dir()]
    name = "-".join(folders or [Path(source).stem for source in sources])[:80]
    return f"sweep-{name}" + (f"-{form}" if form else "")


def _recipes(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*.toml") if not path.name.startswith("."))
    if not found:
        raise RecipeError(f"{folder}: no recipe (.toml) in this folder; name one that holds recipes, or a recipe")
    return found


def _parent(path: Path, form: str) -> str | None:
    line = lineage(path)
    if len(line) < 2:
        return None
    place, table = line[-2]
    return (f"{form}_" if form else "") + str(table.get("name", place.stem))


def _shared(recipe: Recipe) -> str:
    """A hash of what all seeds of a recipe share."""
    return tables.sha256({k: v for k, v in lean(recipe).items() if k not in ONES_OWN})
