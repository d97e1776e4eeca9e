"""Is a record what it says? Its scripts are made again from its commit's code, and run alone in an empty folder.

The code is taken out of git where this checkout's is another; where git does not have it, this checkout stands in, and
the check says so.

Alone: `python -I` (no environment, no user's packages, nothing from the working folder) under a guard that wraps the
import finders: what they find outside the standard library is hidden, unless requirements.txt names it or what it names
needs it. This package is hidden with the rest.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairway.artifact import open_artifact
from fairway.artifact.bundle import unpacked
from fairway.base import files, folders
from fairway.base.errors import ContractError, RecipeError
from fairway.base.journal import JOURNAL
from fairway.data import open_corpus
from fairway.lab.finished import curve_of
from fairway.lab.submit.commits import Code, code_of
from fairway.lab.submit.entries import Entry, entry
from fairway.lab.submit.export import SCORE, TRAIN, checkout
from fairway.lab.submit.record import REQUIREMENTS, load
from fairway.steps.products import ARTIFACT, RECIPE

STEPS = 20
SLICE = 8_000  # bytes of held-out text that are scored
CLOSE = 1e-4  # relative, of a loss on other hardware than the run's: math libraries order their sums differently

GUARD = """
import os, runpy, sys, sysconfig
class Named:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        found = self.finder.find_spec(name, path, target)
        return found if found is None or name.partition(".")[0] in names or standard(found.origin or "") else None
def standard(place):
    inside = any(place.startswith(library) for library in libraries) and "-packages" + os.sep not in place
    return inside or place in ("built-in", "frozen")
names, libraries = set(sys.argv[1].split(",")), {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
libraries = {os.path.realpath(library) + os.sep for library in libraries} | {library + os.sep for library in libraries}
sys.meta_path[:] = [Named(finder) for finder in sys.meta_path]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

MAKE = """
import sys
from pathlib import Path
from fairway.base import recipes
from fairway.lab.submit import score_script, train_script
from fairway.recipe import Recipe
recipe = recipes.load(Recipe, Path(sys.argv[1]))
for name, script in zip(sys.argv[2:], (train_script(recipe), score_script(recipe)), strict=True):
    Path(name).write_bytes(script)
"""  # run by the record's code, which may be another


@dataclass(frozen=True)
class Check:
    """What a check found. rebuilt: {script: whether these bytes come of that code}; commits: the record's and this
    checkout's; made_by: "checkout", "commit" or "other", the code that made them (commits.py); scores: code length in
    bits of the same text, by script and package; losses: of the first steps, by script and run; exact: whether the
    run's hardware is this one, so that its losses must come again to the last bit; differing: modules that the code
    has otherwise."""

    rebuilt: dict[str, bool]
    commits: dict[str, str | None]
    made_by: str
    importable: list[str]
    seed: int
    text_bytes: int
    scores: dict[str, float]
    losses: dict[str, list[float]]
    exact: bool
    differing: list[str]

    @property
    def same_score(self) -> bool:
        return self.scores["script"] == self.scores["package"]

    @property
    def same_losses(self) -> bool:
        ours, run = self.losses["script"], self.losses["run"]
        if len(ours) != len(run) or not ours:
            return False
        return ours == run or (not self.exact and max(abs(a / b - 1) for a, b in zip(ours, run, strict=True)) < CLOSE)

    @property
    def holds(self) -> bool:
        return all(self.rebuilt.values()) and self.same_score and self.same_losses

    def plain(self) -> dict[str, Any]:
        return {**asdict(self), "same_score": self.same_score, "same_losses": self.same_losses, "holds": self.holds}


def check(folder: Path, runs: Path, device: str = "auto") -> Check:
    """Checks a record folder with the first of its runs that lies under `runs`.

    RecipeError where none does; DataError, ArtifactError for what cannot be read; ContractError where a script fails.
    """
    record = load(folder)
    one = _at_hand([row for row in record["runs"] if not row["superseded"]], runs)
    names = importable(files.read(folder / REQUIREMENTS).decode(errors="replace").splitlines())
    found = {name: files.read(folder / name) for name in (TRAIN, SCORE)}
    text = _slice(one)
    with (
        tempfile.TemporaryDirectory() as empty,
        code_of(one.row["commit"], one.row["sha256"]["code"]) as code,
    ):
        place = Path(empty)
        made = _made(code, one.folder / RECIPE, place)
        scores = _scores(folder / SCORE, one, text, names, place, device, code)
        losses, here = _losses(folder / TRAIN, one, names, place, device)
    return Check(
        rebuilt={name: found[name] == content for name, content in made.items()},
        commits={"record": one.row["commit"], "code": checkout().commit},
        made_by=code.of,
        importable=sorted(names),
        seed=one.row["seed"],
        text_bytes=len(text),
        scores=scores,
        losses=losses,
        exact=here,
        differing=_differing(found, made),
    )


def _made(code: Code, recipe: Path, place: Path) -> dict[str, bytes]:
    """{name: content} of the scripts that some code makes of a recipe."""
    names = (TRAIN, SCORE)
    _output([sys.executable, "-c", MAKE, str(recipe.resolve()), *names], place, _importing(code))
    made = {name: files.read(place / name) for name in names}
    for name in names:  # the folder is empty again: nothing but requirements.txt's packages is at hand
        (place / name).unlink()
    return made


def _importing(code: Code) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(code.source)}


def _differing(scripts: dict[str, bytes], made: dict[str, bytes]) -> list[str]:
    """The modules in which a record's scripts differ from those of its code; "recipe" where the tables do."""
    found = set()
    for name, content in made.items():
        (table, ours), (other, theirs) = unpacked(content.decode()), unpacked(scripts[name].decode(errors="replace"))
        found |= {module for module in {*ours, *theirs} if ours.get(module) != theirs.get(module)}
        found |= {"recipe"} if table != other else set()
    return sorted(found)


def importable(requirements: list[str]) -> set[str]:
    """First names of all modules of the distributions named, and of those that these ask for in turn."""
    waiting, known = [_name(line) for line in requirements if line.strip()], set[str]()
    while waiting:
        one = waiting.pop()
        if one not in known:
            known.add(one)
            try:
                asked = importlib.metadata.requires(one) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [_name(line) for line in asked if "extra ==" not in line]
    providers = importlib.metadata.packages_distributions()
    return {module for module, found in providers.items() if known & {_name(distribution) for distribution in found}}


def _name(requirement: str) -> str:
    """The normal form of a distribution's name (PEP 503)."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def _at_hand(rows: list[dict[str, Any]], runs: Path) -> Entry:
    for row in rows:
        if (runs / row["run"]).is_dir():
            one = entry(runs / row["run"])
            if one.row["sha256"] != row["sha256"]:
                raise RecipeError(
                    f"{one.folder}: its hashes are not those of the record; `fairway submit --update` takes it"
                )
            return one
    raise RecipeError(f"{runs}: none of the runs of this record ({rows[0]['run']}, …); name their folder with --runs")


def _slice(one: Entry) -> bytes:
    """The beginning of the held-out text."""
    corpus = open_corpus(one.recipe.data, one.recipe.data.held_out)
    if corpus.documents:
        return b"".join(corpus.documents)[:SLICE]
    tokens = corpus.shards[0].tokens[: SLICE // 2]
    return open_artifact(one.folder / ARTIFACT).tokenizer.decode(tokens[1:], previous=int(tokens[0]))[:SLICE]


def _scores(
    script: Path, one: Entry, text: bytes, names: set[str], place: Path, device: str, code: Code
) -> dict[str, float]:
    """Code length in bits by the script, and by the package of `code`. ContractError where one says none."""
    (place / "text").write_bytes(text)
    words = [str((one.folder / ARTIFACT).resolve()), "--device", device, "--json"]
    command = [sys.executable, "-m", "fairway", "score", "text", "-a", *words]
    told = {
        "script": (script.name, _alone(script, [words[0], "text", *words[1:]], names, place, {})),
        "package": ("fairway score", _output(command, place, _importing(code))),
    }
    return {key: _bits(name, output) for key, (name, output) in told.items()}


def _bits(name: str, output: str) -> float:
    try:
        return float(json.loads(output)["code_length_bits"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"{name}: its answer is no score: {output.strip()[:60]!r}") from error


def _losses(script: Path, one: Entry, names: set[str], place: Path, device: str) -> tuple[dict[str, list[float]], bool]:
    """The losses of the first steps, by script and run, and whether this hardware is the run's."""
    data, booked = one.recipe.data, one.facts["device"]
    said = {"SEED": str(one.recipe.seed), "OMP_NUM_THREADS": str(booked["threads"])}
    for name, value in (("DATA_PATH", data.path), ("TOKENIZER_PATH", data.tokenizer.model)):
        if value and Path(value).exists():
            said[name] = str(Path(value).resolve())
    _alone(script, ["--steps", str(STEPS), "--device", device, "--runs", "runs"], names, place, said)
    journals = list(place.glob("runs/*/" + JOURNAL))
    here = next((fact for path in journals for fact in folders.rows(path) if fact.get("fact") == "device"), None)
    if here is None:
        raise ContractError(f"{script.name}: left no journal of a run that says on what it trained")
    same = all(
        here.get(key) == booked.get(key) for key in ("ranks", "device", "processor", "compute", "threads", "torch")
    )
    ours = [loss for step, loss in curve_of(journals[0].parent) if step <= STEPS]
    return {"script": ours, "run": [loss for step, loss in one.curve if step <= STEPS]}, same


def _alone(script: Path, words: list[str], names: set[str], place: Path, said: dict[str, str]) -> str:
    """A script's output, run in `place` with nothing importable but the standard library and `names`."""
    command = [sys.executable, "-I", "-c", GUARD, ",".join(sorted(names)), str(script.resolve()), *words]
    return _output(command, place, {**os.environ, **said})


def _output(command: list[str], place: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise ContractError(
            f"{' '.join(Path(word).name for word in command[-6:])}: ended with {done.returncode}: {last}"
        )
    return done.stdout
