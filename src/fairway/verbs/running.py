"""The steps of a run, one verb each, and all of them."""

import json as json_text
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fairway import pipeline, recipe, steps
from fairway.artifact import open_artifact
from fairway.base.errors import DataError, RecipeError
from fairway.base.files import read
from fairway.base.folders import point_latest
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.lab.submit import checkout
from fairway.outcome import Outcome, rows
from fairway.score import score_text
from fairway.score.profile import Keeper
from fairway.verbs.bar import bar
from fairway.verbs.opening import ranks_on, recipe_of, run_of
from fairway.verbs.printing import answer, table
from fairway.verbs.reporting import page_of


def run(
    name: str | None,
    overrides: tuple[str, ...],
    seeds: str,
    resume: Path | None,
    form: str,
    device: str,
    runs: Path,
    as_json: bool,
    log: str = "",
) -> None:
    """The whole way, for one recipe or one folder to resume, once for each seed."""
    if (name is None) == (resume is None):
        raise RecipeError("fairway run: name a recipe, or a run folder with --resume")
    if resume is not None and (seeds or form):
        what = "--seeds: a resumed run keeps its own seed" if seeds else f"--{form}: a resumed run keeps its own recipe"
        raise RecipeError(f"{what}; leave it out, or start new runs")
    if resume is not None:
        chosen = [recipe_of(resume, overrides)]
    else:
        loaded = recipe.load(str(name), overrides, form)
        chosen = [replace(loaded, seed=seed) for seed in seeds_of(seeds)] or [loaded]
    outcomes, code = [], checkout()
    with ranks_on(device) as (ranks, target):
        for one in chosen:
            with run_of(one, runs, ranks, as_json, resume, log) as opened:
                outcomes.append(pipeline.run(one, opened, target, code))
                if ranks.first and opened.folder is not None:
                    point_latest(opened.folder.resolve())
                    if (page := page_of(opened.folder)) is not None:
                        opened.say(f"page          {page}")
                    if not as_json:
                        show(outcomes[-1], opened.folder)
    if ranks.first:
        _show_seeds(outcomes, as_json)


def train(name: str, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool, log: str = "") -> None:
    chosen = recipe.load(name, overrides)
    with ranks_on(device) as (ranks, target), run_of(chosen, runs, ranks, as_json, log=log) as opened:
        steps.begin(chosen, opened, target, checkout())
        text = steps.prepare(chosen, opened, steps.refuse_overlap)
        steps.train(chosen, text, opened, target)
        steps.calibrate(chosen, text, opened, target)
        if ranks.first:
            facts = {"run": str(opened.folder), **opened.facts["train"], "calibration": opened.facts["calibration"]}
            answer(facts, f"trained: {opened.folder}; next: fairway quantize {opened.folder}", as_json)


def quantize(folder: Path, device: str, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with ranks_on(device) as (ranks, target), run_of(chosen, folder.parent, ranks, as_json, folder) as opened:
        steps.quantize(chosen, opened, target, checkout())
        if ranks.first:
            fact = opened.facts["quant"]
            line = f"quantised: {fact['entropy_bytes']:,} bytes by entropy; next: fairway pack {folder}"
            answer({"run": str(folder), **fact}, line, as_json)


def pack(folder: Path, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        steps.pack(chosen, steps.stored_tokenizer(opened), opened, checkout())
        fact = opened.facts["artifact"]
    if not as_json:
        shown = [(section, f"{size:,}", "") for section, size in fact["sections"].items()]
        table("section", "bytes", [*shown, ("file", f"{fact['bytes']:,}", "weighed")])
    line = f"packed: {folder / steps.ARTIFACT}; next: fairway score {folder}"
    answer({"run": str(folder), **fact}, line, as_json)


def score(target: Path, artifact: Path | None, device: str, as_json: bool) -> None:
    if artifact is None:
        _score_run(target, device, as_json)
        return
    with ranks_on(device) as (ranks, chosen):
        quiet, text = Run(ranks=ranks, quiet=as_json, bar=bar), read(target)
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
    chosen = recipe_of(folder)
    with ranks_on(device) as (ranks, target), run_of(chosen, folder.parent, ranks, as_json, folder) as opened:
        text = steps.prepare(chosen, opened)
        scores = steps.score(chosen, text.held_out, opened, target, Keeper(opened))
        proof = steps.prove(chosen, text.held_out, opened)
        if "scripts" not in opened.facts:  # a run from before scripts were weighed
            steps.export(chosen, opened, checkout())
        outcome = steps.close(chosen, text, scores, proof, opened)
    if ranks.first:
        if as_json:
            print(outcome.json(), end="")
        else:
            show(outcome, folder)


def show(outcome: Outcome, folder: Path | None) -> None:
    """The table that ends a run."""
    table(f"{outcome.recipe}, seed {outcome.seed}", "bits per byte", rows(outcome))
    proof = outcome.proof
    proven = "not proven"
    if proof is not None:
        proven = f"{proof['text_bytes']:,} bytes decoded from a file of {proof['file_bytes']:,}"
    print(
        f"score {outcome.bits_per_byte:.4f} ({outcome.result}; {proven}) on {outcome.text_bytes:,} bytes held out"
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


def seeds_of(text: str) -> list[int]:
    """The seeds of --seeds, none where it is empty."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"--seeds {text}: whole numbers with commas between them, as in 1337,42,2025") from None
