"""Run folders made by hand: every file of a finished run, at the price of none."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fairway.base import tables
from fairway.base.specs import to_plain
from fairway.lab.sweep.book import PLAN
from fairway.lab.sweep.plan import Planned
from fairway.recipe import load
from fairway.score.profile import PROFILE, Bits, Profile, packed
from tests.tiny.way import SAMPLE, TINY

PARTS = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")
STAGES = {"float": 2.0, "quantized": 2.02, "sliding": 1.98, "adapted": 1.95}

SCORED = {"tokens": 40_000, "text_bytes": 100_000, "text_sha256": "text"}
SCORED |= {"artifact_sha256": "file", "seconds": 3.0}


def made_sweep(folder: Path, shifts: dict[str, float], seeds: tuple[int, ...] = (1, 2, 3)) -> Path:
    """A sweep's folder whose first recipe is the baseline; another seed moves a score by 0.002 bits per byte."""
    planned = []
    for at, (name, shift) in enumerate(shifts.items()):
        for seed in seeds:
            one = Planned(f"{at}{seed}", name, seed, name, name, None, at == 0)
            made_run(folder / one.folder, name, seed, shift + 0.002 * (seed + at % 2))
            planned.append(asdict(one))
    lines(folder / PLAN, planned)
    return folder


def made_run(folder: Path, name: str = "tiny", seed: int = 1, shift: float = 0.0, steps: int = 400) -> Path:
    """A finished run whose stages cost `shift` bits per byte more than STAGES."""
    folder.mkdir(parents=True)
    recipe = to_plain(load(str(TINY), (f"data.path={SAMPLE}", f"seed={seed}"))) | {"name": name}
    (folder / "recipe.toml").write_text(tables.dump(recipe))
    stages = {stage: value + shift for stage, value in STAGES.items()}
    lines(folder / "journal.jsonl", facts(name, seed, stages))
    lines(folder / "curves.jsonl", [point(step, steps) for step in range(1, steps + 1)])
    (folder / "score.json").write_text(json.dumps(score(name, seed, stages)))
    (folder / "artifact.fw").write_bytes(bytes(60_000))
    (folder / "train_gpt.py").write_bytes(bytes(50_000))
    (folder / "score.py").write_bytes(bytes(30_000))
    (folder / PROFILE).write_bytes(packed(profile(stages)))
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def point(step: int, steps: int) -> dict[str, Any]:
    loss = 2 + 4 * math.exp(-5 * step / steps) + 0.1 * math.sin(step)
    scale = min(1.0, 2 * (1 - step / steps) + 1 / steps)
    return {"curve": "train", "step": step, "loss": loss, "scale": scale, "norm": 1 / loss, "seconds": step / 10}


def facts(name: str, seed: int, stages: dict[str, float]) -> list[dict[str, Any]]:
    quant = [
        {"fact": f"quant.blocks.{layer}.{part}.weight", "bits": 5, "rounding": "gptq", "zeros": 0.07}
        | {"objective": 1 / (1 + layer), "objective_nearest": 2.0, "entropy": 4.4}
        for layer in range(3)
        for part in PARTS
    ]
    table = {"fact": "quant.embedding.weight", "bits": 6, "rounding": "nearest", "entropy": 5.5, "zeros": 0.03}
    told: list[dict[str, Any]] = [
        {"fact": "run", "recipe": name, "seed": seed},
        {"fact": "prepare", "seconds": 1.0},
        {"fact": "model", "params": 38_730, "vocab": 384},
        {"fact": "train", "steps": 400, "seconds": 40.0, "writing_seconds": 0.1},
        {"fact": "calibration", "seconds": 2.0},
        *quant,
        table,
        {"fact": "quant", "entropy_bytes": 50_000},
        {"fact": "scripts", "train_bytes": 50_000, "score_bytes": 30_000},
        {
            "fact": "artifact",
            "bytes": 60_000,
            "sha256": "file",
            "sections": {"header": 1000, "codes": 58_968, "checksum": 32},
        },
        *(
            {"fact": f"score_{stage}", "bits_per_byte": value, "code_length_bits": value * 100_000, **SCORED}
            for stage, value in stages.items()
        ),
        {"fact": "done", "bits_per_byte": stages["adapted"]},
    ]
    return [{"fact": row["fact"], "time": 1000.0 + at, **row} for at, row in enumerate(told)]


def score(name: str, seed: int, stages: dict[str, float]) -> dict[str, Any]:
    """score.json: 100,000 bytes of text."""
    return {
        "recipe": name,
        "result": "adapted",
        "bits_per_byte": stages["adapted"],
        "text_bytes": 100_000,
        "code_length_bits": stages["adapted"] * 100_000,
        "tokens": 40_000,
        "decoded_text": False,
        "windows": "sliding",
        "stages": stages,
        "artifact_bytes": 60_000,
        "code_bytes": 50_000,
        "challenge_bytes": 110_000,
        "closed_bytes": 90_000,
        "headroom_bytes": 10_000,
        "budget_bytes": 120_000,
        "train_seconds": 40.0,
        "calibration_seconds": 2.0,
        "eval_seconds": 3.0,
        "seed": seed,
        "params": 38_730,
        "recipe_sha256": f"{name}{seed}",
        "text_sha256": "text",
        "artifact_sha256": "file",
        "baselines": {"xz": 2.5, "zstd": 2.6, "brotli": 2.4, "bzip2": None},
        "baselines_with_train": {"zstd": 2.1},
        "proof": {"tokens": 40_000, "decoded_equal": True},
    }


def profile(stages: dict[str, float]) -> Profile:
    """100,000 bytes of text in 50 documents, of which the first letters are words and markup."""
    chance = np.random.default_rng(0)
    sizes = np.full(50, 1000) + np.arange(50) * 40
    sizes[-1] += 100_000 - sizes.sum()
    documents = np.stack([np.arange(50) * 800, np.full(50, 800), sizes]).astype(np.int64)
    buckets = np.stack([np.full(200, 200), np.full(200, 500)]).astype(np.int64)
    pieces = tuple([b"", *(b"The ", b"value", b" <script>", b"alert(1)", b"</script>", b' & "more"\n') * 5])
    bits = {}
    for stage, value in stages.items():
        noise = chance.normal(1, 0.05, 200)
        along = value * 500 * noise / noise.mean()
        sample = chance.uniform(0, 14, len(pieces))
        bits[stage] = Bits(value * sizes.astype(float), along, sample, "file")
    return Profile("text", 100_000, documents, buckets, np.arange(len(pieces)), pieces, bits)
