"""What each verb of the command line does, and how its answer is printed."""

import json as json_text
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fairway import doctor as doctor_checks
from fairway import pipeline, recipe, steps
from fairway.artifact import open_artifact
from fairway.base import recipes, slots
from fairway.base.devices import Device, choose
from fairway.base.errors import DataError, FairwayError, HonestyError, RecipeError
from fairway.base.files import read
from fairway.base.journal import Run, new_folder, point_latest
from fairway.base.ranks import Ranks
from fairway.model import GPT, parameter_count
from fairway.outcome import Outcome, rows
from fairway.recipe import Recipe
from fairway.score import probe as probed
from fairway.score import sample as sampled
from fairway.score import score_text

SLOTS = (
    "data.sources",
    "data.loaders",
    "model.attention",
    "model.mlp",
    "model.embed",
    "train.optim",
    "train.objective",
    "quant.rounding",
    "artifact.coder",
    "score.windows",
    "score.adapt",
)


def run(
    name: str | None,
    overrides: tuple[str, ...],
    seeds: str,
    resume: Path | None,
    device: str,
    runs: Path,
    as_json: bool,
) -> None:
    """The whole way, for one recipe or one folder to resume, once for each seed."""
    if (name is None) == (resume is None):
        raise RecipeError("fairway run: name a recipe, or a run folder with --resume")
    if resume is not None and seeds:
        raise RecipeError("--seeds: a resumed run keeps its own seed; leave it out, or start new runs")
    if resume is not None:
        chosen = [_of_folder(resume, overrides)]
    else:
        loaded = recipe.load(str(name), overrides)
        chosen = [replace(loaded, seed=seed) for seed in _seeds(seeds)] or [loaded]
    outcomes = []
    with _ranks(device) as (ranks, target):
        for one in chosen:
            with _run(one, runs, ranks, quiet=as_json, folder=resume) as opened:
                outcomes.append(pipeline.run(one, opened, target))
                if ranks.first and opened.folder is not None:
                    point_latest(opened.folder.resolve())
                    if not as_json:
                        show(outcomes[-1], opened.folder)
    if ranks.first:
        _show_seeds(outcomes, as_json)


def train(name: str, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool) -> None:
    chosen = recipe.load(name, overrides)
    with _ranks(device) as (ranks, target), _run(chosen, runs, ranks, as_json) as opened:
        steps.begin(chosen, opened, target)
        text = steps.prepare(chosen, opened)
        steps.train(chosen, text, opened, target)
        steps.calibrate(chosen, text, opened, target)
        if ranks.first:
            facts = {"run": str(opened.folder), **opened.facts["train"], "calibration": opened.facts["calibration"]}
            _answer(facts, f"trained: {opened.folder}; next: fairway quantize {opened.folder}", as_json)


def quantize(folder: Path, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
        steps.quantize(chosen, opened, target)
        if ranks.first:
            fact = opened.facts["quant"]
            line = f"quantised: {fact['entropy_bytes']:,} bytes by entropy; next: fairway pack {folder}"
            _answer({"run": str(folder), **fact}, line, as_json)


def pack(folder: Path, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _run(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        steps.pack(chosen, steps.stored_tokenizer(opened), opened)
        fact = opened.facts["artifact"]
    if not as_json:
        table = [(section, f"{size:,}", "") for section, size in fact["sections"].items()]
        _table("section", "bytes", [*table, ("file", f"{fact['bytes']:,}", "weighed")])
    line = f"packed: {folder / steps.ARTIFACT}; next: fairway score {folder}"
    _answer({"run": str(folder), **fact}, line, as_json)


def score(target: Path, artifact: Path | None, device: str, as_json: bool) -> None:
    if artifact is None:
        _score_run(target, device, as_json)
        return
    with _ranks(device) as (ranks, chosen):
        quiet, text = Run(ranks=ranks, quiet=as_json), read(target)
        if not text:
            raise DataError(f"{target}: 0 bytes, nothing to score; name a file with text in it")
        found = score_text(open_artifact(artifact), text, run=quiet, device=chosen, lossy="score_decoded")
    if ranks.first:
        if as_json:
            print(json_text.dumps(asdict(found), indent=2))
        else:
            print(
                f"{found.bits_per_byte:.4f} bits per byte: {found.code_length_bits / 8:,.0f} bytes for "
                f"{found.text_bytes:,} ({found.stage}, {found.seconds:.1f} s)"
                + ("; of the text the tokens decode to" if found.decoded else "")
            )


def _score_run(folder: Path, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        outcome = steps.close(chosen, text, steps.score(chosen, text.held_out, opened, target), opened)
    if ranks.first:
        if as_json:
            print(outcome.json(), end="")
        else:
            show(outcome, folder)


def probe(folder: Path, flips: int, tokens: int, device: str, as_json: bool) -> None:
    chosen = _of_folder(folder)
    with _ranks(device) as (ranks, target), _run(chosen, folder.parent, ranks, as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        reports = probed(
            folder / steps.ARTIFACT,
            text.held_out,
            chosen.score,
            opened,
            device=target,
            targets=tokens,
            flips=flips,
        )
    if not ranks.first:
        return
    if as_json:
        print(json_text.dumps([asdict(report) for report in reports], indent=2))
    else:
        findings = [(report.stage, one) for report in reports for one in report.findings]
        table = [
            (
                f"{stage}: {one.check}",
                f"{one.worst:.3g}",
                f"allowed {one.allowed:.3g}" + ("" if one.honest else "  BROKEN"),
            )
            for stage, one in findings
        ]
        _table("check", "nats moved", table)
    broken = [report.stage for report in reports if not report.honest]
    if broken:
        raise HonestyError(f"{folder}: stage {broken[0]} reads what it scores; this is no score")


def sample(artifact: Path, prompt: str, tokens: int, temperature: float, seed: int, device: str, as_json: bool) -> None:
    opened = open_artifact(artifact)
    if as_json:
        text = "".join(sampled(opened, prompt, tokens, temperature, seed, choose(device)))
        _answer({"prompt": prompt, "text": text, "seed": seed}, "", as_json)
        return
    sys.stdout.write(prompt)
    for piece in sampled(opened, prompt, tokens, temperature, seed, choose(device)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def doctor(as_json: bool) -> None:
    checks = doctor_checks.report()
    if as_json:
        print(json_text.dumps([asdict(check) for check in checks], indent=2))
        return
    remarks = ["; ".join(filter(None, (check.found, check.remedy))) for check in checks]
    _table("what", "state", [(c.name, c.state, remark) for c, remark in zip(checks, remarks, strict=True)])


def list_recipes(as_json: bool) -> None:
    home = recipe.recipes_folder()
    if home is None:
        raise RecipeError("recipes: no folder of that name here; run from a checkout, or name a .toml file")
    listed = []
    for path in sorted(home.glob("*.toml")):
        one = recipe.load(str(path))
        listed.append(
            {
                "name": one.name,
                "params": _params(one),
                "budget_bytes": one.budget.artifact_bytes,
                "summary": one.summary,
            }
        )
    if as_json:
        print(json_text.dumps(listed, indent=2))
        return
    _table("recipe", "parameters", [(str(r["name"]), f"{r['params']:,}", str(r["summary"])) for r in listed])


def list_techniques(as_json: bool) -> None:
    found = {slot: slots.kinds(f"fairway.{slot}") for slot in SLOTS}
    if as_json:
        print(json_text.dumps(found, indent=2))
        return
    _table("slot", "", [(slot, "", ", ".join(names)) for slot, names in found.items()])


def show(outcome: Outcome, folder: Path | None) -> None:
    """The table that ends a run."""
    _table(f"{outcome.recipe}, seed {outcome.seed}", "bits per byte", rows(outcome))
    print(
        f"score {outcome.bits_per_byte:.4f} ({outcome.result}, not proven) on {outcome.text_bytes:,} bytes held out"
        + (" (as decoded by the tokenizer)" if outcome.decoded_text else "")
        + f"; run folder {folder}"
    )


def _show_seeds(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        whole: Any = [asdict(outcome) for outcome in outcomes]
        print(json_text.dumps(whole[0] if len(whole) == 1 else whole, indent=2))
    elif len(outcomes) > 1:
        scores = [outcome.bits_per_byte for outcome in outcomes]
        print(f"{len(scores)} seeds: {statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f} bits per byte")


def _answer(facts: dict[str, Any], line: str, as_json: bool) -> None:
    """A verb's answer: facts for programs, or one line for people."""
    print(json_text.dumps(facts, indent=2) if as_json else line)


def _table(what: str, value: str, table: list[tuple[str, str, str]]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column(what)
    drawn.add_column(value, justify="right")
    drawn.add_column("")
    for row in table:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


def _params(one: Recipe) -> int:
    """The parameters of a recipe's model, counted without allocating it."""
    with torch.device("meta"):
        return parameter_count(GPT(one.model, one.data.tokenizer.vocab))


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"--seeds {text}: whole numbers with commas between them, as in 1337,42,2025") from None


def _of_folder(folder: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The resolved recipe of a run folder."""
    path = folder / steps.RECIPE
    if not path.exists():
        raise RecipeError(f"{folder}: no run folder ({steps.RECIPE} is missing); name one under runs/")
    return recipes.load(Recipe, path, overrides)


@contextmanager
def _ranks(device: str) -> Iterator[tuple[Ranks, Device]]:
    ranks = Ranks.start(cuda=device != "cpu" and torch.cuda.is_available())
    try:
        yield ranks, choose(device, ranks.local_rank)
    finally:
        ranks.stop()


def _run(one: Recipe, root: Path, ranks: Ranks, quiet: bool = False, folder: Path | None = None) -> Run:
    """The run of a folder, a new one where none is given; every rank has the same."""
    if folder is None:
        made = ""
        if ranks.first:
            try:
                made = str(new_folder(root, one.name, one.seed))
            except FairwayError as error:
                made = f"error: {error}"
        made = ranks.share_text(made)
        if made.startswith("error: "):
            raise RecipeError(made.removeprefix("error: "))
        folder = Path(made)
    return Run(folder, ranks, quiet)
