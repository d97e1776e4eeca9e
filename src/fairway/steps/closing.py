"""What stands beside a score: its proof, and the compressors on the same text."""

import json

from fairway.base import files
from fairway.base.errors import HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.data import Tokens
from fairway.outcome import Outcome
from fairway.recipe import Recipe
from fairway.score import ChunkProof, Proof, StageScore, baselines, baselines_with_train
from fairway.score import prove as prove_slice
from fairway.score import prove_chunks as prove_some
from fairway.score.prices import PRICES, read_prices
from fairway.steps.products import ARTIFACT, SCORE, Text, product, tidy
from fairway.steps.scoring import booked_score

MOST_ALONE = 50_000_000  # bytes of held-out text for the compressors: brotli -11 makes half a megabyte a second
MOST_KNOWN = 100_000_000  # tokens of training text for zstd -22 to know; the challenge's are 8 billion


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
        tidy(run, SCORE)  # what was a score before is none now
        raise
    finally:  # other ranks wait here, and end with the first
        ended = run.ranks.share_text("failed" if run.ranks.first and found is None else "proven")
    if ended == "failed":
        raise HonestyError("proof: failed on the first rank; this is no score")
    return found


def _proven(recipe: Recipe, held_out: Tokens, run: Run, wanted: int) -> Proof:
    path, stage = product(run, ARTIFACT), recipe.score.result
    booked = run.facts.get(f"score_{stage}", {})
    known = (booked.get("artifact_sha256"), booked.get("text_sha256")) == (files.sha256(path), held_out.text_sha256)
    scored = booked_score(booked) if known else None
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
        found = prove_some(product(run, ARTIFACT), held_out, recipe.score, run, folder, chunks, nonce, claimed)
    except HonestyError:
        tidy(run, SCORE)
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
