"""Run folders made up for tests: a score, a recipe, a journal and a profile as a run leaves them, without a run."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fairway.base import tables
from fairway.base.specs import to_plain
from fairway.recipe import load
from fairway.score.profile import Bits, Profile, packed
from tests.tiny.way import SAMPLE, TINY

SIZES = (900, 400, 2_500, 300, 1_200, 700)  # bytes of the documents of the made-up text
STAGES = ("float", "quantized", "sliding", "adapted")


def made_run(
    folder: Path,
    seed: int,
    bits_per_byte: float,
    *overrides: str,
    name: str = "tiny",
    text: str = "text",
    text_bytes: int = sum(SIZES),
    tokens: int = 2_000,
    steps: int = 60,
    proven: bool = False,
    documents: tuple[float, ...] | None = (),
    finished: bool = True,
) -> Path:
    """A run folder of the tiny recipe with `overrides`, adapted result `bits_per_byte`, the other stages 0.01 above.
    documents: bits of each, evenly spread where it is empty; None: no profile."""
    recipe = replace(load(str(TINY), (f"data.path={SAMPLE}", *overrides)), name=name, seed=seed)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(tables.dump(to_plain(recipe)))
    text_sha256, files = _digest(text), {stage: _digest(f"{folder} {stage == 'float'}") for stage in STAGES}
    stages = [stage for stage in STAGES if stage in recipe.score.stages]
    scores = {stage: bits_per_byte + 0.01 * (stage != recipe.score.result) for stage in stages}
    facts = {
        "train": {"steps": steps, "seconds": 0.1 * steps},
        "artifact": {"bytes": 40_000, "sha256": files["adapted"]},
    }
    for stage, score in scores.items():
        row = {"bits_per_byte": score, "code_length_bits": score * text_bytes, "tokens": tokens, "seconds": 3.0}
        row |= {"text_bytes": text_bytes, "text_sha256": text_sha256, "artifact_sha256": files[stage]}
        facts[f"score_{stage}"] = row
    (folder / "journal.jsonl").write_text("".join(json.dumps({"fact": k, **v}) + "\n" for k, v in facts.items()))
    if finished:
        result = facts[f"score_{recipe.score.result}"]
        outcome = {key: result[key] for key in ("bits_per_byte", "code_length_bits", "tokens", "text_bytes")}
        outcome |= {"text_sha256": text_sha256, "artifact_sha256": files["adapted"], "result": recipe.score.result}
        outcome |= {"recipe": name, "seed": seed, "stages": scores, "proof": {"tokens": 600} if proven else None}
        (folder / "score.json").write_text(json.dumps(outcome))
    if documents is not None:
        kept = {stage: _bits(score, documents, files[stage]) for stage, score in scores.items()}
        counts = np.array(SIZES) // 4
        parts = np.stack([np.cumsum(counts) - counts, counts, SIZES])
        profile = Profile(text_sha256, text_bytes, parts, np.ones((2, 1), int), np.array([1]), (b"a",), kept)
        (folder / "profile.npz").write_bytes(packed(profile))
    return folder


def _bits(score: float, documents: tuple[float, ...], digest: str) -> Bits:
    bits = np.array(documents or [score * size for size in SIZES])
    return Bits(bits, np.array([bits.sum()]), np.array([1.0]), digest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
