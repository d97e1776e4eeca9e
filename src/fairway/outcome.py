"""What a run came to: the numbers of score.json, and the table that a person reads."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from fairway.base import tables
from fairway.base.errors import HonestyError
from fairway.base.journal import Run
from fairway.base.slots import kind_of
from fairway.base.specs import to_plain
from fairway.recipe import Recipe
from fairway.score import StageScore


@dataclass(frozen=True)
class Outcome:
    """The content of score.json. Sizes in bytes, times in seconds, scores in bits per byte of the original text."""

    recipe: str
    result: str  # the stage named beforehand as the result
    bits_per_byte: float
    text_bytes: int
    code_length_bits: float
    tokens: int
    decoded_text: bool  # the text is what the tokens decode to: the tokenizer cannot return the original
    windows: str  # of the stages sliding and adapted: sliding, rolling, plain
    stages: dict[str, float | None]
    artifact_bytes: int
    code_bytes: int  # of the training script
    challenge_bytes: int  # that script + artifact
    closed_bytes: int | None  # all that a decoder needs: score.py + artifact, which holds the tokenizer
    headroom_bytes: int | None  # budget − challenge_bytes; null where there is no budget
    budget_bytes: int
    train_seconds: float
    calibration_seconds: float
    eval_seconds: float
    seed: int
    params: int
    recipe_sha256: str
    text_sha256: str
    artifact_sha256: str
    baselines: dict[str, float | None]
    baselines_with_train: dict[str, float | None]
    proof: dict[str, Any] | None  # null: not proven

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        scores: dict[str, StageScore],
        run: Run,
        alone: dict[str, float | None],
        with_train: dict[str, float | None],
        proof: dict[str, Any] | None,
    ) -> "Outcome":
        """From the stages' scores and the run's facts. HonestyError where the result's stage was not scored, or on
        another file than the artifact."""
        result = scores.get(recipe.score.result)
        if result is None:
            raise HonestyError(f"score.result = {recipe.score.result!r}: this stage was not scored")
        facts = run.facts
        if recipe.score.result != "float" and result.artifact_sha256 != facts["artifact"]["sha256"]:
            raise HonestyError("the scored file is not the artifact of this run; score it again")
        scripts, limit = facts["scripts"], recipe.budget.artifact_bytes
        artifact, code = facts["artifact"]["bytes"], scripts["train_bytes"]
        stages = {stage: None for stage in ("float", "quantized", "sliding", "adapted")}
        return cls(
            recipe=recipe.name,
            result=recipe.score.result,
            bits_per_byte=result.bits_per_byte,
            text_bytes=result.text_bytes,
            code_length_bits=result.code_length_bits,
            tokens=result.tokens,
            decoded_text=result.decoded,
            windows=kind_of(recipe.score.windows),
            stages=stages | {stage: score.bits_per_byte for stage, score in scores.items()},
            artifact_bytes=artifact,
            code_bytes=code,
            challenge_bytes=artifact + code,
            closed_bytes=artifact + scripts["score_bytes"] if "score_bytes" in scripts else None,
            headroom_bytes=limit - artifact - code if limit else None,
            budget_bytes=limit,
            train_seconds=facts["train"]["seconds"],
            calibration_seconds=facts["calibration"]["seconds"],
            eval_seconds=result.seconds,
            seed=recipe.seed,
            params=facts["model"]["params"],
            recipe_sha256=tables.sha256(to_plain(recipe)),
            text_sha256=result.text_sha256,
            artifact_sha256=facts["artifact"]["sha256"],
            baselines=alone,
            baselines_with_train=with_train,
            proof=proof,
        )

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def rows(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The table: what, bits per byte, remark."""
    budget = f", of {outcome.budget_bytes:,}" if outcome.budget_bytes else ""
    names = {"float": "float", "quantized": "quantised", "sliding": outcome.windows, "adapted": "adapted"}
    remarks = {
        "float": f"{outcome.params:,} parameters, trained {outcome.train_seconds:.0f} s",
        "quantized": f"{outcome.artifact_bytes:,} bytes + {outcome.code_bytes:,} of code{budget}, weighed",
        "sliding": "each token with its context",
        "adapted": "learning only from tokens already scored",
    }
    table = []
    for stage, name in names.items():
        value = outcome.stages[stage]
        proven = "not proven"
        if outcome.proof is not None:
            proven = "proven" if outcome.proof["tokens"] == outcome.tokens else "a slice of it proven"
        mark = f" <- the score, {proven}" if stage == outcome.result else ""
        table.append((name, "-" if value is None else f"{value:.4f}", remarks[stage] + mark))
    for name, value in outcome.baselines.items():
        table.append((_NAMES[name], "-" if value is None else f"{value:.4f}", "the same text alone"))
    for name, value in outcome.baselines_with_train.items():
        table.append((_NAMES[name], "-" if value is None else f"{value:.4f}", "with the training text as dictionary"))
    return table


def proof_rows(proof: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A proof as a table: what, value, remark."""
    words = 100 * (8 * (proof["file_bytes"] - proof["framing_bytes"]) / proof["ideal_bits"] - 1)
    table = [
        ("text", f"{proof['text_bytes']:,} bytes", f"{proof['tokens']:,} of {proof['of_tokens']:,} tokens"),
        ("file", f"{proof['file_bytes']:,} bytes", f"{proof['framing_bytes']:,} of them headers and checksums"),
        ("bits per byte", f"{proof['bits_per_byte']:.4f}", "8 · file / text"),
        ("ideal", f"{proof['ideal_bits'] / 8:,.1f} bytes", "Σ −log2 of the float64 softmax"),
        (
            "gap",
            f"{proof['gap_percent']:+.3f} %",
            f"of the whole file over the ideal; of the coder's words {words:+.3f} %",
        ),
    ]
    if proof["scored_bits"] is not None:
        remark = f"the same tokens as scored ({proof['scored_as']}); coded {proof['scored_gap_percent']:+.4f} %"
        table.append(("scored", f"{proof['scored_bits'] / 8:,.1f} bytes", remark))
    table += [
        ("updates", str(proof["updates"]), f"stage {proof['stage']}"),
        ("seconds", f"{proof['seconds']:.1f}", f"{proof['decode_seconds']:.1f} of them decoding, in another process"),
    ]
    return table


_NAMES = {"xz": "xz -9e", "zstd": "zstd -22", "brotli": "brotli -11", "bzip2": "bzip2 -9"}
