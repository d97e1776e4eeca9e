"""The record's README: blocks between markers: an update rewrites what was measured and leaves a person's words."""

import re
import statistics
from collections.abc import Mapping
from typing import Any

from fairway.base.errors import RecipeError
from fairway.lab.finished import differences, flat
from fairway.lab.statistics import CHANCE, MARGIN, chance_above, seeds_needed

Row = dict[str, Any]
BLOCKS = ("summary", "changes", "results", "standing", "rules", "architecture", "files")
TITLES = {
    "changes": "What changed",
    "results": "Results",
    "standing": "Record or not",
    "rules": "Rules, line by line",
    "architecture": "Architecture",
    "files": "Files and hashes",
}


def write(record: Mapping[str, Any]) -> str:
    """The whole README of a record (the content of submission.json)."""
    parts = [f"# {record['name']}", _block("summary", blocks(record)["summary"])]
    for name in BLOCKS[1:]:
        parts += [f"## {TITLES[name]}", _block(name, blocks(record)[name])]
    return "\n\n".join(parts) + "\n"


def rewrite(text: str, record: Mapping[str, Any]) -> str:
    """A README with its blocks written again. RecipeError where a marker is missing."""
    for name, content in blocks(record).items():
        found = re.search(f"<!-- {name} -->.*?<!-- /{name} -->", text, re.DOTALL)
        if found is None:
            raise RecipeError(
                f"README.md: the markers <!-- {name} --> and <!-- /{name} --> are gone; put them back around that part"
            )
        text = text[: found.start()] + _block(name, content) + text[found.end() :]
    return text


def blocks(record: Mapping[str, Any]) -> dict[str, str]:
    """The text of every block."""
    rows: list[Row] = record["runs"]
    current = [row for row in rows if not row["superseded"]]
    return {
        "summary": _summary(record, current),
        "changes": _changes(record.get("replaces"), record["recipe"], current),
        "results": _results(rows, current),
        "standing": standing(current, record["bar_bpb"]),
        "rules": _rules(current),
        "architecture": _architecture(record["recipe"], record["params"]),
        "files": _files(rows),
    }


def standing(current: list[Row], bar: float | None) -> str:
    """Whether this is a record against the bar, by which margin, and what is still needed."""
    losses = [row["val_loss"] for row in current]
    per_token = statistics.mean(row["val_bpb"] for row in current) / statistics.mean(losses)  # bpb of one nat per token
    broken = sorted({line["rule"] for row in current for line in row["rules"] if line["verdict"] == "broken"})
    if bar is None:
        text = "Non-record: no bar was named (`--bar BPB`)."
    else:
        wanted = bar / per_token - MARGIN
        margin, needed = bar / per_token - statistics.mean(losses), seeds_needed(losses, wanted, CHANCE)
        shown = chance_above(losses, wanted) if len(losses) > 1 else None
        text = (
            f"Bar: {bar:.4f} bits per byte. Margin: {margin * per_token:+.4f} bits per byte, {margin:+.4f} nats per "
            f"token of the {MARGIN} that are asked for at p < {CHANCE}"
            + (f"; p = {shown:.2g}" if shown is not None else "; one seed has no p")
            + ". "
        )
        if needed == 0:
            text += "**Record** by the score" + ("." if not broken else ", but not by the rules below.")
        elif needed is None:
            text += "**Non-record**: seeds like these would not show it, however many."
        else:
            text += f"**Non-record** so far: about {needed} more seed{'s' * (needed > 1)} like these would decide."
    return text + (f" Rules not held: {', '.join(broken)}." if broken else "")


def _block(name: str, content: str) -> str:
    return f"<!-- {name} -->\n{content}\n<!-- /{name} -->"


def _summary(record: Mapping[str, Any], current: list[Row]) -> str:
    one = current[0]
    score = statistics.mean(row["val_bpb"] for row in current)
    return (
        f"{record['blurb']}\n\n**{score:.4f} bits per byte** ({one['result']}; {_seeds(current)}), "
        f"{max(row['total_bytes'] for row in current):,} bytes at most, code included."
    )


def _changes(replaces: Mapping[str, Any] | None, recipe: Mapping[str, Any], current: list[Row]) -> str:
    if replaces is None:
        return "Replaces nothing (`--replaces RUN` compares with a run)."
    found = {key: pair for key, pair in differences(replaces["recipe"], recipe).items() if key not in _NAMES}
    table = [f"| `{key}` | {_told(old)} | {_told(new)} |" for key, (old, new) in found.items()]
    head = f"Against `{replaces['run']}` (seed {replaces['seed']}):"
    lines = [head, "", "| recipe | before | now |", "|---|---|---|", *table] if table else [f"{head} the same recipe."]
    lines += ["", "| result | before | now | change |", "|---|---|---|---|"]
    for key, name, digits in _RESULTS:
        old, new = replaces[key], statistics.mean(row[key] for row in current)
        lines.append(f"| {name} | {old:,.{digits}f} | {new:,.{digits}f} | {new - old:+,.{digits}f} |")
    return "\n".join(lines)


_NAMES = ("seed", "name", "summary")
_RESULTS = (
    ("val_bpb", "bits per byte", 4),
    ("base_bpb", "base", 4),
    ("artifact_bytes", "artifact, bytes", 0),
    ("code_bytes", "code, bytes", 0),
    ("train_seconds", "training, s", 1),
    ("calibration_seconds", "GPTQ calibration, s", 1),
    ("eval_seconds", "scoring, s", 1),
)


def _results(rows: list[Row], current: list[Row]) -> str:
    lines = [
        "base: the artifact over the same windows without learning; s_0: each token paid before anything learned it.",
        "",
        "| seed | base | s_0 | gain | artifact | headroom | train + GPTQ | eval | steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = f" (superseded, {row['date']})" if row["superseded"] else ""
        lines.append(_line(f"{row['seed']}{mark}", row))
    if len(current) > 1:
        lines.append(_line("**mean**", {key: statistics.mean(row[key] for row in current) for key in _MEASURED}))
        spread = [statistics.stdev(row[key] for row in current) for key in ("base_bpb", "val_bpb", "gain_bpb")]
        lines.append(f"| **deviation** | {' | '.join(f'{one:.4f}' for one in spread)} | | | | | |")
    return "\n".join(lines)


_MEASURED = (
    *("base_bpb", "val_bpb", "gain_bpb", "artifact_bytes", "total_bytes", "budget_bytes"),
    *("train_seconds", "calibration_seconds", "eval_seconds", "steps"),
)


def _line(name: str, row: Row) -> str:
    room = f"{row['budget_bytes'] - row['total_bytes']:,.0f}" if row["budget_bytes"] else "no budget"
    return (
        f"| {name} | {row['base_bpb']:.4f} | {row['val_bpb']:.4f} | {row['gain_bpb']:.4f} | "
        f"{row['artifact_bytes']:,.0f} | {room} | "
        f"{row['train_seconds']:.1f} + {row['calibration_seconds']:.1f} s | {row['eval_seconds']:.1f} s | "
        f"{row['steps']:,.0f} |"
    )


def _rules(current: list[Row]) -> str:
    lines = [f"Facts are those of the runs' journals (logs beside this file), {_seeds(current)}.", ""]
    for line in current[-1]["rules"]:
        each = [one for row in current for one in row["rules"] if one["rule"] == line["rule"]]
        verdicts = list(dict.fromkeys(one["verdict"] for one in each))
        facts = "; ".join(f"`{fact}` = {_values([one['facts'].get(fact) for one in each])}" for fact in line["facts"])
        note = f" ({line['note']})" if line["note"] else ""
        lines.append(f"- **{line['rule']}**: {line['asks']}. {' and '.join(verdicts)}: {facts}{note}.")
    return "\n".join(lines)


def _architecture(recipe: Mapping[str, Any], params: int) -> str:
    lines = [f"{params:,} parameters."]
    for room in ("model", "train", "qat", "quant", "pack", "score"):
        told = ", ".join(f"{key} = {_told(value)}" for key, value in flat(recipe.get(room, {})))
        lines.append(f"- `{room}`: {told}")
    return "\n".join(lines)


def _files(rows: list[Row]) -> str:
    one = next(row for row in reversed(rows) if not row["superseded"])
    lines = [
        "`train_gpt.py` is all of the code that is counted; `score.py` opens an artifact and scores a text with it; "
        "both unpack with `--unpack FOLDER`. Artifacts are not part of this folder: they lie in the run folders named "
        "here.",
        "",
        f"- train_gpt.py sha256 {one['sha256']['script']}",
        f"- score.py sha256 {one['sha256']['score_script']}",
        f"- training text sha256 {one['sha256']['train_text']}",
        f"- held-out text sha256 {one['sha256']['held_out_text']}",
        f"- tokenizer sha256 {one['sha256']['tokenizer']}",
    ]
    for row in rows:
        mark = " (superseded)" if row["superseded"] else ""
        lines.append(f"- seed {row['seed']}{mark}: `{row['run']}/artifact.fw`, sha256 {row['sha256']['artifact']}")
    return "\n".join(lines)


def _seeds(rows: list[Row]) -> str:
    return f"seed{'s' * (len(rows) > 1)} {', '.join(str(row['seed']) for row in rows)}"


def _values(values: list[Any]) -> str:
    told = [_told(value) for value in values]
    return told[0] if len(set(told)) == 1 else ", ".join(told)


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "not set" if value is None else str(value)
