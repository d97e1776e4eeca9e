"""The steps of a run. Each reads the products of those before it from the run folder, and writes its own there whole;
one whose product is there already does nothing, so that `--resume` goes on where a run stopped.
"""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import fairway
from fairway.artifact import open_artifact, seal, write_weights
from fairway.artifact.integers import read_integers, write_integers
from fairway.base import files, recipes, slots
from fairway.base.clock import Stopwatch, hold
from fairway.base.devices import Device
from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import to_plain
from fairway.data import Batches, Tokenizer, Tokens, batches, build_tokenizer, open_corpus, tokenize
from fairway.doctor import git_commit, memory_bytes
from fairway.model import GPT, build_model, parameter_count
from fairway.outcome import Outcome
from fairway.quant import FakeQuant, plan
from fairway.quant import calibrate as gather_hessians
from fairway.quant import quantize as quantize_model
from fairway.quant.observe import read_hessians, write_hessians
from fairway.recipe import Recipe
from fairway.score import ChunkProof, Proof, StageScore, baselines, baselines_with_train, evaluate
from fairway.score import prove as prove_slice
from fairway.score import prove_chunks as prove_some
from fairway.score.booking import PRICES, read_prices
from fairway.score.codec import limits
from fairway.score.evaluate import model_on, stream_of
from fairway.train import pretrain

RECIPE, WEIGHTS, HESSIANS, INTEGERS, ARTIFACT, SCORE = (
    "recipe.toml",
    "weights.safetensors",
    "hessians.safetensors",
    "integers.safetensors",
    "artifact.fw",
    "score.json",
)


MOST_ALONE = 50_000_000  # bytes of held-out text for the compressors: brotli -11 makes half a megabyte a second
MOST_KNOWN = 100_000_000  # tokens of training text for zstd -22 to know; the challenge's are 8 billion
STATE_BYTES = 20  # of training, for each parameter: weight, gradient, two moments, average


@dataclass(frozen=True)
class Text:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens


def begin(recipe: Recipe, run: Run, device: Device) -> None:
    """Writes the resolved recipe, or refuses a run folder that holds another one; books where and with what it runs."""
    for stage in recipe.score.stages:  # a stride over the context is refused now, not when training is over
        stream_of(stage, 1, recipe.score, recipe.model.context)
    schedule, limit = recipe.train.schedule, recipe.budget.train_seconds
    if schedule.by == "clock" and limit and schedule.seconds >= limit:
        raise RecipeError(
            f"train.schedule.seconds = {schedule.seconds:g}: training ends after it, over budget.train_seconds = "
            f"{limit:g}; leave time for the last step and for calibration"
        )
    table = to_plain(recipe)
    if run.writes:
        path = run.path(RECIPE)
        resolved = recipes.dump(table)
        if path.exists() and path.read_text() != resolved:
            raise RecipeError(f"{path}: holds another recipe; resume without changes, or start a new run")
        files.write(path, resolved)
    _same_recipe(recipe, run)
    run.fact("run", recipe=recipe.name, recipe_sha256=recipes.sha256(table), seed=recipe.seed, started=time.ctime())
    run.fact("versions", fairway=fairway.__version__, python=platform.python_version(), numpy=np.__version__)
    run.fact("code", commit=git_commit(Path(__file__).parent), sha256=_code_sha256())
    run.fact("device", ranks=run.ranks.world, **device.describe())


def prepare(recipe: Recipe, run: Run) -> Text:
    """Text, tokenizer and tokens. Before the training clock; other ranks wait for the first one's caches.

    DataError where a run that goes on finds another text than it began with: what was trained on then may be held out
    now.
    """
    _same_recipe(recipe, run)
    with Stopwatch() as watch:
        if not run.ranks.first:
            run.ranks.wait()
        corpus, held_out = open_corpus(recipe.data, "train"), open_corpus(recipe.data, recipe.data.held_out)
        tokenizer = build_tokenizer(recipe.data, corpus)
        text = Text(
            tokenizer,
            tokenize(corpus, tokenizer, recipe.data.lossy, run),
            tokenize(held_out, tokenizer, recipe.data.lossy, run),
        )
        if run.ranks.first:
            run.ranks.wait()
    _book_text(run, "train_text", tokens=len(text.train), **corpus.describe())
    _book_text(run, "held_out_text", tokens=len(text.held_out), **held_out.describe())
    _book_text(run, "tokenizer", size=tokenizer.size, sha256=tokenizer.sha256, bytes=len(tokenizer.model))
    run.fact("prepare", seconds=round(watch.seconds, 3))
    if recipe.proof_bytes and len(text.held_out) > 1:  # refused now, not when everything is scored
        targets, score = len(text.held_out) - 1, recipe.score
        limits.check(score, score.result, recipe.model.context, targets, targets, score.lanes)
    run.say(
        f"text          train {corpus.bytes:,} bytes, {len(text.train):,} tokens; {held_out.split} {held_out.bytes:,} "
        f"bytes, {len(text.held_out):,} tokens; sha256 {held_out.sha256[:12]} (held out)"
    )
    return text


def train(recipe: Recipe, text: Text, run: Run, device: Device) -> None:
    """Trains the model and writes its averaged float weights."""
    if _done(run, WEIGHTS, "train"):
        return
    _refuse_giants(recipe, text.tokenizer.size)
    model = build_model(recipe.model, text.tokenizer.size, recipe.seed).to(device.torch)
    model.compute = device.compute
    plan(model, recipe.quant)  # refuses an override that names nothing now, not when training is over
    run.fact("model", params=parameter_count(model), vocab=text.tokenizer.size)
    _announce(recipe, model, run)
    qat = FakeQuant(model, recipe.quant, recipe.qat) if recipe.qat.kind != "off" else None
    trained = pretrain(model, _training_batches(recipe, text, run), recipe.train, run, device, recipe.seed, qat)
    with Stopwatch() as writing:  # on the clock: training data is read once more after it
        if run.writes:
            write_weights(run.path(WEIGHTS), model, text.tokenizer, _decoder(recipe))
    run.fact("train", **trained.__dict__, writing_seconds=writing.seconds)
    hold(
        "training", trained.seconds, recipe.budget.train_seconds, "s", "take fewer steps or a shorter clock", run.ranks
    )
    _tidy(run, "checkpoint.pt", HESSIANS, INTEGERS, ARTIFACT)  # what came of other weights is stale
    run.ranks.wait()


def calibrate(recipe: Recipe, text: Text, run: Run, device: Device) -> None:
    """Gathers Hessians on training text: the last time that training data is read, inside the training clock.

    The clock runs from the first training step to here, writing and opening the weights included; an attempt that was
    over budget counts when it is made again.
    """
    if _done(run, HESSIANS, "calibration"):
        return
    context = recipe.model.context
    with Stopwatch(float(run.facts.get("calibration", {}).get("seconds", 0.0))) as watch:
        model = _float_model(run, device)
        count = min(recipe.quant.calibration_sequences, max((len(text.train) - 1) // context, 1))
        hessians = gather_hessians(model, _calibration(text.train, context, count, recipe, run), recipe.quant, run)
    run.fact("calibration", seconds=watch.seconds, sequences=count, matrices=len(hessians))
    spent = float(run.facts["train"]["seconds"]) + float(run.facts["train"]["writing_seconds"]) + watch.seconds
    remedy = "shorten train.schedule.seconds or quant.calibration_sequences"
    hold("training + calibration", spent, recipe.budget.train_seconds, "s", remedy, run.ranks)
    if run.writes:
        write_hessians(run.path(HESSIANS), hessians)
    _tidy(run, INTEGERS, ARTIFACT)
    run.ranks.wait()


def quantize(recipe: Recipe, run: Run, device: Device) -> None:
    """Weights and Hessians -> integers. Reads no text."""
    _same_recipe(recipe, run)
    if _done(run, INTEGERS, "quant"):
        return
    hessians = {name: value.to(device.torch) for name, value in read_hessians(_product(run, HESSIANS)).items()}
    integers = quantize_model(_float_model(run, device), (), recipe.quant, run, hessians)
    if run.writes:
        write_integers(run.path(INTEGERS), integers)
    _tidy(run, ARTIFACT)
    run.ranks.wait()


def pack(recipe: Recipe, tokenizer: Tokenizer, run: Run) -> None:
    """Integers -> the artifact, weighed by stat(); over budget it is removed and BudgetError raised."""
    _same_recipe(recipe, run)
    path = run.path(ARTIFACT)
    if not _done(run, ARTIFACT, "artifact"):
        if run.writes:
            integers = read_integers(_product(run, INTEGERS))
            seal(path, integers, recipe.model, tokenizer.size, tokenizer, _decoder(recipe), recipe.pack)
        run.ranks.wait()
        sealed = open_artifact(path)
        run.fact("artifact", bytes=path.stat().st_size, sha256=sealed.sha256, sections=sealed.sections)
    size, limit = path.stat().st_size, recipe.budget.artifact_bytes
    run.ranks.wait()
    if limit and size > limit:
        _tidy(run, ARTIFACT)
    remedy = "quantise to fewer bits, prune, take a stronger coder or a smaller model"
    hold("artifact", size, limit, "bytes", remedy, run.ranks)


def score(recipe: Recipe, held_out: Tokens, run: Run, device: Device) -> dict[str, StageScore]:
    """Every stage of the recipe, each from a file that it opens itself."""
    found: dict[str, StageScore] = {}
    for stage in recipe.score.stages:
        path = _product(run, WEIGHTS if stage == "float" else ARTIFACT)
        booked = run.facts.get(f"score_{stage}", {})
        known = booked.get("artifact_sha256") == files.sha256(path)
        known = known and (stage != recipe.score.result or run.path(PRICES).exists())
        if run.ranks.world == 1 and known and booked["text_sha256"] == held_out.text_sha256:
            found[stage] = _stage_score(booked)
        else:
            limit = recipe.budget.eval_seconds if stage == recipe.score.result else 0.0
            found[stage] = evaluate(path, held_out, recipe.score, run, stage, device, limit)
        run.say(f"{stage:<13} {found[stage].bits_per_byte:.4f} bits per byte  ({found[stage].seconds:.1f} s)")
    return found


def prove(recipe: Recipe, held_out: Tokens, run: Run, slice_bytes: int | None = None) -> Proof | None:
    """A slice of the held-out text, written with the artifact as a real file and decoded by another process.

    slice_bytes: as the recipe says where it is None, 0: the whole text. None where the recipe wants no proof.
    """
    wanted = recipe.proof_bytes if slice_bytes is None else slice_bytes
    if slice_bytes is None and not wanted:
        return None
    found: Proof | None = None
    try:
        if run.ranks.first:
            found = _proven(recipe, held_out, run, wanted)
            run.fact("proof", **found.plain())
    except HonestyError:
        _tidy(run, SCORE)  # what was a score before is none now
        raise
    finally:  # other ranks wait here, and end with the first
        ended = run.ranks.share_text("failed" if run.ranks.first and found is None else "proven")
    if ended == "failed":
        raise HonestyError("proof: failed on the first rank; this is no score")
    return found


def _proven(recipe: Recipe, held_out: Tokens, run: Run, wanted: int) -> Proof:
    path, stage = _product(run, ARTIFACT), recipe.score.result
    booked = run.facts.get(f"score_{stage}", {})
    known = (booked.get("artifact_sha256"), booked.get("text_sha256")) == (files.sha256(path), held_out.text_sha256)
    scored = _stage_score(booked) if known else None
    prices = read_prices(run.path(".")) if known else None
    if known and prices is None:
        raise RecipeError(f"{run.path(PRICES)}: not there; `fairway score {run.folder}` makes it again")
    return prove_slice(path, held_out, recipe.score, run, wanted, scored, prices)


def prove_chunks(recipe: Recipe, held_out: Tokens, run: Run, chunks: int, nonce: str) -> ChunkProof:
    """Some chunks of an adapted score that was made in exact mode."""
    folder, score = run.path("."), run.path(SCORE)
    claimed = json.loads(score.read_text())["code_length_bits"] if score.exists() else None
    if claimed is None:
        raise RecipeError(f"{score}: not there; --chunks proves a score: `fairway score {run.folder}` makes it")
    try:
        found = prove_some(_product(run, ARTIFACT), held_out, recipe.score, run, folder, chunks, nonce, claimed)
    except HonestyError:
        _tidy(run, SCORE)
        raise
    run.fact("proof_chunks", **found.plain())
    return found


def book_proof(run: Run, proof: Proof) -> None:
    """The proof as part of a score that is there already."""
    path = run.path(SCORE)
    if path.exists():
        table = json.loads(path.read_text())
        before = table.get("proof") or {"tokens": 0}
        if before["tokens"] > proof.tokens and before.get("artifact_sha256") == proof.artifact_sha256:
            return  # more of it is proven already
        if table.get("artifact_sha256") == proof.artifact_sha256 and table.get("text_sha256") == proof.text_sha256:
            files.write(path, json.dumps({**table, "proof": proof.plain()}, indent=2, allow_nan=False) + "\n")


def close(recipe: Recipe, text: Text, scores: dict[str, StageScore], proof: Proof | None, run: Run) -> Outcome:
    """The score with all that stands beside it, written as score.json."""
    alone: dict[str, float | None] = {}
    with_train: dict[str, float | None] = {}
    if recipe.baselines and run.ranks.first:
        if text.held_out.text_bytes <= MOST_ALONE:
            run.say("compressors   xz, zstd, brotli and bzip2 on the same text")
            alone = baselines(text.held_out.text, run)
        if alone and len(text.train) <= MOST_KNOWN:
            with_train = baselines_with_train(text.held_out.text, text.train.text, run)
        if not with_train:
            run.fact("substitution", what="baselines", why="left out: too much text for the compressors")
    outcome = Outcome.of(recipe, scores, run, alone, with_train, None if proof is None else proof.plain())
    if run.writes:
        files.write(run.path(SCORE), outcome.json())
    run.fact("done", bits_per_byte=outcome.bits_per_byte)
    return outcome


def _stage_score(booked: dict[str, Any]) -> StageScore:
    """A score from its fact in the journal."""
    return StageScore(**{field.name: booked[field.name] for field in fields(StageScore) if field.name in booked})


def stored_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run's weights, for the steps that need no text."""
    return open_artifact(_product(run, WEIGHTS)).tokenizer


def _training_batches(recipe: Recipe, text: Text, run: Run) -> Batches:
    data, context = recipe.data, recipe.model.context
    return batches(text.train, data.loader, recipe.train.batch_tokens, context, recipe.seed, run.ranks)


def _calibration(train: Tokens, context: int, count: int, recipe: Recipe, run: Run) -> Iterator[Tensor]:
    """This rank's share of the first `count` windows of the training text, in batches."""
    order = slots.technique("fairway.data.loaders", "sequential").Spec()
    rows = batches(train, order, count * context, context, recipe.seed).batch(0)[0]
    mine = rows[run.ranks.share(count)]
    if len(mine):  # with fewer windows than ranks some have none
        yield from mine.split(recipe.quant.calibration_batch)


def _float_model(run: Run, device: Device) -> GPT:
    return model_on(open_artifact(_product(run, WEIGHTS)), device)


def _decoder(recipe: Recipe) -> dict[str, object]:
    """The decoder's share of the recipe: what a score is computed with."""
    return {"recipe": recipe.name, "score": to_plain(recipe.score)}


def _refuse_giants(recipe: Recipe, vocab: int) -> None:
    """A model whose training state cannot fit this machine's memory is refused before anything is allocated."""
    numbers, memory = recipe.model.matrices(vocab), memory_bytes()
    if memory is not None and numbers * STATE_BYTES > memory:
        raise RecipeError(
            f"model: about {numbers:,} parameters need {numbers * STATE_BYTES / 1e9:,.0f} GB to train, "
            f"this machine has {memory / 1e9:,.0f} GB; lower model.layers, width or hidden"
        )


def _announce(recipe: Recipe, model: GPT, run: Run) -> None:
    """What is about to happen: sizes, and what memory it takes (weights, gradients, two moments, average)."""
    params = parameter_count(model)
    schedule = recipe.train.schedule
    length = f"{schedule.seconds:.0f} s" if schedule.by == "clock" else f"{schedule.steps:,} steps"
    run.say(
        f"model         {params:,} parameters, about {params * STATE_BYTES / 1e6:,.0f} MB for training state; "
        f"{length} of {recipe.train.batch_tokens:,} tokens; artifact budget {recipe.budget.artifact_bytes:,} bytes"
    )


def _done(run: Run, product: str, fact: str) -> bool:
    """Whether a step's product and its fact are both there (the same answer on every rank)."""
    done = run.folder is not None and run.path(product).exists() and fact in run.facts
    return run.ranks.max(float(done)) > 0


def _same_recipe(recipe: Recipe, run: Run) -> None:
    """Products of another recipe are never taken up: not even where recipe.toml was edited in the run folder."""
    began = run.facts.get("run", {}).get("recipe_sha256")
    if began is not None and began != recipes.sha256(to_plain(recipe)):
        raise RecipeError(
            f"{run.folder}: its products come from another recipe ({RECIPE} was edited) or version; start a new run"
        )


def _book_text(run: Run, name: str, **facts: object) -> None:
    began = run.facts.get(name, facts)
    if began != facts:
        what = name.replace("_", " ")
        raise DataError(
            f"{run.folder}: the {what} has changed since this run began ({began.get('bytes'):,} bytes then, "
            f"{facts['bytes']:,} now); start a new run"
        )
    run.fact(name, **facts)


def _product(run: Run, name: str) -> Path:
    path = run.path(name)
    if not path.exists():
        raise RecipeError(f"{path}: not there yet; take the step that writes it first, or `fairway run --resume`")
    return path


def _tidy(run: Run, *names: str) -> None:
    if run.writes:
        for name in names:
            run.path(name).unlink(missing_ok=True)


def _code_sha256() -> str:
    """One hash over every Python file of the package."""
    root = Path(__file__).parent
    listed = sorted(root.rglob("*.py"))
    return recipes.sha256([[str(path.relative_to(root)), files.sha256(path)] for path in listed])
