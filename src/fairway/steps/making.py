"""From text to one file: the steps that make an artifact."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

import fairway
from fairway.artifact import open_artifact, seal, write_weights
from fairway.artifact.integers import read_integers, write_integers
from fairway.base import files, slots, tables
from fairway.base.clock import Stopwatch, hold
from fairway.base.devices import Device
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import to_plain
from fairway.data import Corpus, Tokenizer, Tokens, batches, build_tokenizer, open_corpus, tokenize
from fairway.doctor import memory_bytes
from fairway.model import GPT, build_model, parameter_count
from fairway.quant import FakeQuant, observed
from fairway.quant import quantize as quantize_model
from fairway.quant.observe import read_hessians, write_hessians
from fairway.recipe import Recipe
from fairway.score.codec import limits
from fairway.score.evaluate import model_on, stream_of
from fairway.steps.code import Code, export
from fairway.steps.products import (
    ARTIFACT,
    HESSIANS,
    INTEGERS,
    RECIPE,
    WEIGHTS,
    Text,
    decoder_share,
    done,
    product,
    same_recipe,
    tidy,
)
from fairway.train import pretrain
from fairway.train.schedule import rate_scale

Check = Callable[[Recipe, Corpus, Corpus, Text, Run], None]

STATE_BYTES = 20  # of training, for each parameter: weight, gradient, two moments, average


def begin(recipe: Recipe, run: Run, device: Device, code: Code) -> None:
    """Writes the resolved recipe, or refuses a run folder that holds another one; books where and with what it runs."""
    for stage in recipe.score.stages:  # a stride over the context is refused now, not when training is over
        stream_of(stage, 1, recipe.score, recipe.model.context)
    if recipe.score.reshape:
        slots.optional("fairway.score.reshaping").check(recipe.score.reshape, recipe.score.result)
    schedule, limit = recipe.train.schedule, recipe.budget.train_seconds
    if schedule.by == "clock" and limit and schedule.seconds >= limit:
        raise RecipeError(
            f"train.schedule.seconds = {schedule.seconds:g}: training ends after it, over budget.train_seconds = "
            f"{limit:g}; leave time for the last step and for calibration"
        )
    table = to_plain(recipe)
    if run.writes:
        path = run.path(RECIPE)
        resolved = tables.dump(table)
        if path.exists() and path.read_text() != resolved:
            raise RecipeError(f"{path}: holds another recipe; resume without changes, or start a new run")
        files.write(path, resolved)
    same_recipe(recipe, run)
    run.fact("run", recipe=recipe.name, recipe_sha256=tables.sha256(table), seed=recipe.seed, started=time.ctime())
    run.fact("versions", fairway=fairway.__version__, python=platform.python_version(), numpy=np.__version__)
    run.fact("code", **code.describe())
    run.fact("device", ranks=run.ranks.world, **device.describe())


def prepare(recipe: Recipe, run: Run, check: Check | None = None) -> Text:
    """Text, tokenizer and tokens. Before the training clock; other ranks wait for the first one's caches. check: looks
    at both texts before anything is trained.

    DataError where a run that goes on finds another text than it began with: what was trained on then may be held out
    now.
    """
    same_recipe(recipe, run)
    with Stopwatch() as watch:
        if not run.ranks.first:
            run.ranks.wait()
        data = recipe.data if check is None else replace(recipe.data, overlap_limit=1.0)  # the check books, and judges
        corpus, held_out = open_corpus(data, "train"), open_corpus(data, data.held_out)
        tokenizer = build_tokenizer(recipe.data, corpus)
        if recipe.model.bos != tokenizer.bos:
            raise RecipeError(f"model.bos = {recipe.model.bos}: the tokenizer's is {tokenizer.bos}; set model.bos")
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
    if check is not None:
        check(recipe, corpus, held_out, text, run)
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
    if done(run, WEIGHTS, "train"):
        return
    _refuse_giants(recipe, text.tokenizer.size)
    model = build_model(recipe.model, text.tokenizer.size, recipe.seed).to(device.torch)
    model.compute = device.compute
    source = slots.module_of(recipe.quant.calibration)  # it and the plan refuse now, not when training is over
    observer = source.observer(recipe.quant, model, observed(model, recipe.quant), run)
    if observer is not None and recipe.train.schedule.by == "steps":
        observer.foresee(rate_scale(recipe.train.schedule, step, 0.0) for step in range(recipe.train.schedule.steps))
    run.fact("model", params=parameter_count(model), vocab=text.tokenizer.size)
    _announce(recipe, model, run)
    qat: FakeQuant | None = None
    if recipe.qat.kind != "off":
        qat = slots.optional("fairway.quant.fake").FakeQuant(model, recipe.quant, recipe.qat)
    with _training_batches(recipe, text, run, device) as made:
        trained = pretrain(model, made, recipe.train, run, device, recipe.seed, qat, observer)
    if hasattr(mlp := slots.module_of(recipe.model.mlp), "report"):
        mlp.report(run.fact, device.torch)
    with Stopwatch() as writing:  # on the clock: training data is read once more after it
        if run.writes:
            write_weights(run.path(WEIGHTS), model, text.tokenizer, decoder_share(recipe))
        if observer is not None:
            observer.finish()
    run.fact("train", **trained.__dict__, writing_seconds=writing.seconds)
    hold(
        "training", trained.seconds, recipe.budget.train_seconds, "s", "take fewer steps or a shorter clock", run.ranks
    )
    tidy(run, "checkpoint.pt", HESSIANS, INTEGERS, ARTIFACT)  # what came of other weights is stale
    run.ranks.wait()


def calibrate(recipe: Recipe, text: Text, run: Run, device: Device) -> None:
    """Gathers Hessians. On training text it is the last time that training data is read, inside the training clock;
    other sources read none here: their seconds are facts of their own, and of `calibration` 0.

    The clock runs from the first training step to here, writing and opening the weights included; an attempt that was
    over budget counts when it is made again.
    """
    if done(run, HESSIANS, "calibration"):
        return
    context, source = recipe.model.context, slots.module_of(recipe.quant.calibration)
    with Stopwatch(float(run.facts.get("calibration", {}).get("seconds", 0.0))) as watch:
        model = _float_model(run, device)
        count = min(recipe.quant.calibration_sequences, max((len(text.train) - 1) // context, 1))
        windows = _calibration(text.train, context, count, recipe, run)
        hessians = source.hessians(recipe.quant, model, observed(model, recipe.quant), windows, run, recipe.seed)
    seconds = watch.seconds * source.ON_CLOCK
    run.fact("calibration", seconds=seconds, sequences=count * source.ON_CLOCK, matrices=len(hessians))
    spent = float(run.facts["train"]["seconds"]) + float(run.facts["train"]["writing_seconds"]) + seconds
    remedy = "shorten train.schedule.seconds or quant.calibration_sequences"
    hold("training + calibration", spent, recipe.budget.train_seconds, "s", remedy, run.ranks)
    if run.writes:
        write_hessians(run.path(HESSIANS), hessians)
    tidy(run, INTEGERS, ARTIFACT)
    run.ranks.wait()


def quantize(recipe: Recipe, run: Run, device: Device, code: Code) -> None:
    """Weights and Hessians -> integers; with `quant.fit`, those that fit its budget. Reads no text."""
    same_recipe(recipe, run)
    if done(run, INTEGERS, "quant"):
        return
    hessians = {name: value.to(device.torch) for name, value in read_hessians(product(run, HESSIANS)).items()}
    model, fitting = _float_model(run, device), recipe.quant.fit
    if fitting.budget:
        taken = export(recipe, run, code) if fitting.code else 0
        slots.optional("fairway.steps.budgeting").fit_run(recipe, run, model, hessians, taken)
    elif recipe.quant.prune.budget:
        slots.optional("fairway.steps.pruned").prune_run(recipe, run, model, hessians)
    else:
        integers = quantize_model(model, hessians, recipe.quant, run)
        if run.writes:
            write_integers(run.path(INTEGERS), integers)
        tidy(run, ARTIFACT)
    run.ranks.wait()


def pack(recipe: Recipe, tokenizer: Tokenizer, run: Run, code: Code) -> None:
    """Integers -> the artifact, weighed with the script by stat(); over budget it is removed and BudgetError raised."""
    same_recipe(recipe, run)
    script = export(recipe, run, code)
    path = run.path(ARTIFACT)
    if not done(run, ARTIFACT, "artifact"):
        if run.writes and not (path.exists() and run.facts.get("fit", {}).get("artifact_sha256") == files.sha256(path)):
            integers = read_integers(product(run, INTEGERS))
            seal(path, integers, recipe.model, tokenizer.size, tokenizer, decoder_share(recipe), recipe.pack)
        run.ranks.wait()
        sealed = open_artifact(path)
        run.fact("artifact", bytes=path.stat().st_size, sha256=sealed.sha256, sections=sealed.sections)
    size, limit = path.stat().st_size, recipe.budget.artifact_bytes
    run.ranks.wait()
    if limit and size + script > limit:
        tidy(run, ARTIFACT)
    remedy = (
        f"{size:,} of them are the artifact, {script:,} the script; "
        "quantise to fewer bits, prune, take a stronger coder or a smaller model"
    )
    hold("artifact + code", size + script, limit, "bytes", remedy, run.ranks)


def stored_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run's weights, for the steps that need no text."""
    return open_artifact(product(run, WEIGHTS)).tokenizer


def _training_batches(recipe: Recipe, text: Text, run: Run, device: Device) -> Any:
    """A context that gives `Batches`, or what prepares them in the background."""
    data, context = recipe.data, recipe.model.context
    made = batches(text.train, data.loader, recipe.train.batch_tokens, context, recipe.seed, run.ranks)
    if not data.ahead:
        return nullcontext(made)
    return slots.optional("fairway.data.prefetch").Ahead(made, data.ahead, device.torch.type == "cuda")


def _calibration(train: Tokens, context: int, count: int, recipe: Recipe, run: Run) -> Iterator[Tensor]:
    """This rank's share of the first `count` windows of the training text, in batches."""
    order = slots.technique("fairway.data.loaders", "sequential").Spec()
    rows = batches(train, order, count * context, context, recipe.seed).batch(0)[0]
    mine = rows[run.ranks.share(count)]
    if len(mine):  # with fewer windows than ranks some have none
        yield from mine.split(recipe.quant.calibration_batch)


def _float_model(run: Run, device: Device) -> GPT:
    return model_on(open_artifact(product(run, WEIGHTS)), device)


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


def _book_text(run: Run, name: str, **facts: object) -> None:
    began = run.facts.get(name, facts)
    if began != facts:
        what = name.replace("_", " ")
        raise DataError(
            f"{run.folder}: the {what} has changed since this run began ({began.get('bytes'):,} bytes then, "
            f"{facts['bytes']:,} now); start a new run"
        )
    run.fact(name, **facts)
