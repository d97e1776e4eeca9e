"""The challenge's rules, line by line, each with the facts of the journal that speak for it.

A verdict is read from facts alone: "held" and "broken" where they decide it, "open" where they do not.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fairway.lab.submit.origin import Origin
from fairway.recipe import Recipe

MOST_BYTES = 16_000_000
MOST_SECONDS = 600.0
TEXT_BYTES = 151_080_891  # of the first 50,000 documents, the challenge's validation text

Verdict = Literal["held", "broken", "open"]
Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """rule: its short name; asks: what it asks; facts: {fact of the journal: its value}; note: what they do not say."""

    rule: str
    asks: str
    verdict: Verdict
    facts: dict[str, Any]
    note: str = ""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def rules(recipe: Recipe, facts: Facts, made: Origin) -> list[Line]:
    """All lines, for one run. made: which code it comes of."""
    return [*_budgets(recipe, facts), *_data(recipe, facts), *_honesty(recipe, facts), _code(made)]


def _budgets(recipe: Recipe, facts: Facts) -> list[Line]:
    artifact, code = facts["artifact"]["bytes"], facts["scripts"]["train_bytes"]
    train, calibration = facts["train"], facts["calibration"]
    spent = train["seconds"] + train["writing_seconds"] + calibration["seconds"]
    scored, device = facts[f"score_{recipe.score.result}"], facts["device"]
    challenge = device["ranks"] == 8 and "H100" in str(device["processor"])
    return [
        Line(
            "size",
            f"code + artifact <= {MOST_BYTES:,} bytes, all code in train_gpt.py",
            _verdict(artifact + code <= MOST_BYTES),
            {"artifact.bytes": artifact, "scripts.train_bytes": code, "sum": artifact + code},
        ),
        Line(
            "training time",
            f"<= {MOST_SECONDS:.0f} s from the first step to the last read of training data",
            _verdict(spent <= MOST_SECONDS),
            {
                "train.seconds": train["seconds"],
                "train.writing_seconds": train["writing_seconds"],
                "calibration.seconds": calibration["seconds"],
                "sum": spent,
            },
        ),
        Line(
            "scoring time",
            f"<= {MOST_SECONDS:.0f} s from opening the file to the last payment",
            _verdict(scored["seconds"] <= MOST_SECONDS),
            {f"score_{recipe.score.result}.seconds": scored["seconds"]},
        ),
        Line(
            "machine",
            "8 x H100",
            _verdict(challenge),
            {"device.ranks": device["ranks"], "device.processor": device["processor"]},
        ),
    ]


def _data(recipe: Recipe, facts: Facts) -> list[Line]:
    train, held_out, tokenizer = facts["train_text"], facts["held_out_text"], facts["tokenizer"]
    stage = f"score_{recipe.score.result}"
    scored = facts[stage]
    apart = held_out["split"] == "valid" and train["split"] == "train"
    return [
        Line(
            "held-out text",
            "no validation text in training: documents on both sides are refused before training",
            _verdict(apart and train.get("sha256") != held_out.get("sha256")),
            {
                "train_text.split": train["split"],
                "held_out_text.split": held_out["split"],
                "held_out_text.sha256": held_out.get("sha256"),
            },
        ),
        Line(
            "whole split",
            f"the whole fixed validation text, {TEXT_BYTES:,} bytes",
            _verdict(scored["text_bytes"] == TEXT_BYTES),
            {
                f"{stage}.text_bytes": scored["text_bytes"],
                f"{stage}.tokens": scored["tokens"],
                f"{stage}.text_sha256": scored["text_sha256"],
            },
            "" if scored["text_bytes"] == TEXT_BYTES else "another text than the challenge's",
        ),
        Line(
            "bytes",
            "bits per byte of the text, never of a token table: the tokens decode to the bytes that are counted",
            "open" if scored["decoded"] else _verdict(_same_text(scored, held_out)),
            {
                f"{stage}.text_bytes": scored["text_bytes"],
                "held_out_text.bytes": held_out["bytes"],
                f"{stage}.text_sha256": scored["text_sha256"],
                "held_out_text.sha256": held_out["sha256"],
                f"{stage}.decoded": scored["decoded"],
                "tokenizer.sha256": tokenizer["sha256"],
            },
            "counted are the bytes that the tokens decode to, not those of the text" if scored["decoded"] else "",
        ),
        Line(
            "nothing from outside",
            "scoring opens the artifact and the held-out text, nothing else; no training data, no network",
            _verdict(scored["artifact_sha256"] == facts["artifact"]["sha256"]),
            {
                f"{stage}.artifact_sha256": scored["artifact_sha256"],
                "artifact.sha256": facts["artifact"]["sha256"],
            },
        ),
    ]


def _honesty(recipe: Recipe, facts: Facts) -> list[Line]:
    scored, proof = facts[f"score_{recipe.score.result}"], facts.get("proof")
    decoded = {
        "proof.tokens": proof["tokens"] if proof else None,
        "proof.of_tokens": proof["of_tokens"] if proof else None,
        "proof.file_bytes": proof["file_bytes"] if proof else None,
        "proof.updates": proof["updates"] if proof else None,
    }
    own = bool(proof and proof["artifact_sha256"] == facts["artifact"]["sha256"])
    shown: Verdict = "held" if own else "open"
    note = "" if own else "`fairway prove` decodes a slice"
    stage, there = f"score_{recipe.score.result}", facts["held_out_text"]["tokens"]
    paid = {
        f"{stage}.tokens": scored["tokens"],
        "held_out_text.tokens": there,
        f"{stage}.windows": scored["windows"],
        f"{stage}.units": scored["units"],
    }
    return [
        Line(
            "causal", "p_t depends on the artifact and on tokens before t alone: a file decodes", shown, decoded, note
        ),
        Line("normalised", "a distribution over the whole vocabulary before the token is seen", shown, decoded, note),
        Line("score before update", "a token is paid before anything learns from it", shown, decoded, note),
        Line(
            "one pass",
            "each token of the text but the first, which nothing stands before, is paid once",
            _verdict(scored["tokens"] == there - 1),  # the ledger refuses a second payment, and a score with one owed
            paid,
        ),
        Line(
            "seed",
            "seeds are not chosen by their score; every one that was run is listed",
            "open",
            {"run.seed": recipe.seed},
        ),
    ]


def _code(made: Origin) -> Line:
    """Never broken: scripts of other code are refused (origin.py)."""
    return Line(
        "code",
        "the scripts of this record are those of the code that trained",
        "held" if made.booked else "open",
        {"code.sha256": made.code["sha256"], "scripts.code_sha256": made.code["sha256"] if made.booked else None},
        "" if made.booked else "not booked by that version; `fairway submit --check` makes the scripts again",
    )


def _same_text(scored: dict[str, Any], held_out: dict[str, Any]) -> bool:
    return (scored["text_bytes"], scored["text_sha256"]) == (held_out["bytes"], held_out["sha256"])


def _verdict(holds: bool) -> Verdict:
    return "held" if holds else "broken"
