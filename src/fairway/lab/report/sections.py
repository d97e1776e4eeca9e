"""What a run says in tables: stages, bytes, budgets, quantisation, a text with its prices, the journal."""

import json
import re
from dataclasses import fields
from html import escape
from typing import Any

from fairway.lab.report import parts
from fairway.lab.report.charts import NAMES
from fairway.lab.report.curves import number
from fairway.lab.report.folder import Folder
from fairway.lab.submit.export import SCORE, TRAIN
from fairway.lab.submit.weighing import Weight
from fairway.outcome import Outcome, rows
from fairway.steps.products import ARTIFACT

_BLOCK = re.compile(r"quant\.blocks\.(\d+)\.(.+?)(?:\.weight)?")
_DEAREST = 12.0  # bits from which a token is shaded darkest
_FACTS = 200  # of the journal's facts are shown from its beginning, and as many from its end
_VALUE = 400  # letters of a fact's values


def stages(folder: Folder) -> str:
    """Bits per byte of each stage, beside the compressors on the same text."""
    try:
        told = rows(Outcome(**{field.name: folder.score[field.name] for field in fields(Outcome)}))
    except (KeyError, TypeError, ValueError, AttributeError):  # unfinished, or another version's score.json
        told = [(NAMES[stage], f"{value:.4f}", "") for stage, value in folder.stages.items()]
    known = [(name, value, remark) for name, value, remark in told if value != "-"]
    if not known:
        return ""
    most = max(float(value) for _, value, _ in known)
    chosen = [at for at, (_, _, remark) in enumerate(known) if "<- the score" in remark]
    lines = [
        (name, value, parts.bar(float(value) / most), remark.replace(" <- the score,", "; the score,"))
        for name, value, remark in known
    ]
    return parts.table(("stage", "bits per byte", "", "what it is"), lines, ("bits per byte",), chosen)


def budgets(folder: Folder) -> str:
    """What was spent of each budget."""
    train, calibration = (number(folder.get(fact, "seconds")) for fact in ("train", "calibration"))
    writing = number(folder.get("train", "writing_seconds")) or 0.0
    artifact, code = number(folder.get("artifact", "bytes")), number(folder.get("scripts", "train_bytes")) or 0.0
    seconds, size = folder.figure("budget", "train_seconds"), folder.figure("budget", "artifact_bytes")
    trained = None if train is None else train + writing
    both = None if trained is None or calibration is None else trained + calibration
    scored = number(folder.get(f"score_{folder.result}", "seconds"))
    stage = NAMES.get(folder.result, folder.result)
    spent = [
        ("training, s", trained, seconds, ",.1f"),
        ("calibration, s", calibration, seconds, ",.1f"),
        ("both, s", both, seconds, ",.1f"),
        (f"scoring ({stage}), s", scored, folder.figure("budget", "eval_seconds"), ",.1f"),
        ("artifact + code, bytes", None if artifact is None else artifact + code, size, ",.0f"),
    ]
    lines = [
        (
            name,
            format(value, shown),
            f"{limit:,.0f}" if limit else "none",
            f"{100 * value / limit:.1f} %" if limit else "",
            parts.bar(value / limit if limit else 0.0),
        )
        for name, value, limit, shown in spent
        if value is not None
    ]
    if not lines:
        return ""
    return parts.table(("budget", "spent", "limit", "share", ""), lines, ("spent", "limit", "share"))


def weights(folder: Folder) -> list[str]:
    """Both sums that a run weighs, by stat(), and the sections that the artifact is made of."""
    train, score, artifact = (folder.size(name) for name in (TRAIN, SCORE, ARTIFACT))
    told = folder.get("artifact", "sections")
    known = {str(name): number(size) for name, size in told.items()} if isinstance(told, dict) else {}
    sections = {name: int(size) for name, size in known.items() if size is not None}
    if artifact is None:
        return []
    rows_ = [("artifact", f"{artifact:,}", ARTIFACT)]
    if train is not None and score is not None:
        budget = int(folder.figure("budget", "artifact_bytes") or 0)
        rows_ = Weight(str(folder.path), train, score, artifact, {}, budget, (), False).rows()
    chosen = [at for at, row in enumerate(rows_) if row[0] in ("challenge", "closed")]
    most = max(sections.values(), default=0)
    lines = [
        (name, f"{size:,}", f"{100 * size / artifact:.1f} %", parts.bar(size / most if most else 0.0))
        for name, size in sections.items()
    ]
    sums = parts.table(("file", "bytes", "what it is"), rows_, ("bytes",), chosen)
    inside = parts.table(("section", "bytes", "share", ""), lines, ("bytes", "share")) if lines else ""
    return [f"<div><h3>what is weighed</h3>{sums}</div>", f"<div><h3>inside the artifact</h3>{inside}</div>"]


def quantisation(folder: Folder) -> list[str]:
    """Error, entropy and zeros of every matrix: by layer and part, and of those outside the layers."""
    facts = {name: fact for name, fact in folder.facts.items() if name.startswith("quant.")}
    layers: dict[int, dict[str, dict[str, Any]]] = {}
    for name, fact in facts.items():
        if found := _BLOCK.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = fact
    names = list(dict.fromkeys(part for row in layers.values() for part in row))
    tables = [_by_layer(layers, names, *measure) for measure in _MEASURES]
    others = [
        (
            name.removeprefix("quant.").removesuffix(".weight"),
            *(_cell(fact, "", key, shown)[0] or "-" for key, shown in _COLUMNS.values()),
            str(fact.get("rounding", "")),
        )
        for name, fact in facts.items()
        if not _BLOCK.fullmatch(name)
    ]
    rest = parts.table(("outside the layers", *_COLUMNS, "rounding"), others, tuple(_COLUMNS)) if others else ""
    whole = "".join(tables)
    return [
        f'<div class="grid">{whole}</div>' if whole else "",
        f'<div style="margin-top:.75rem">{rest}</div>' if rest else "",
    ]


def _by_layer(
    layers: dict[int, dict[str, dict[str, Any]]], names: list[str], title: str, key: str, over: str, shown: str
) -> str:
    cells = {
        (layer, name): _cell(row[name], over, key, shown)
        for layer, row in layers.items()
        for name in names
        if name in row
    }
    values = [value for _, value in cells.values() if value is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    lines = []
    for layer in sorted(layers):
        line = [str(layer)]
        for name in names:
            text, value = cells.get((layer, name), ("", None))
            line.append("" if value is None else parts.heat(text, (value - low) / ((high - low) or 1.0)))
        lines.append(line)
    short = [name.rpartition(".")[2] for name in names]
    return f"<div><h3>{escape(title)}</h3>{parts.table(('layer', *short), lines, short)}</div>"


def _cell(fact: dict[str, Any], over: str, key: str, shown: str) -> tuple[str, float | None]:
    value = number(fact.get(key))
    if over and value is not None:
        whole = number(fact.get(over))
        value = value / whole if whole else None
    return ("", None) if value is None else (format(value, shown).replace("%", " %"), value)


_MEASURES = (
    ("error left by rounding (objective)", "objective", "", "#.3g"),
    ("error, of rounding to nearest", "objective", "objective_nearest", ".0%"),
    ("entropy, bits a weight", "entropy", "", ".2f"),
    ("zeros", "zeros", "", ".1%"),
)
_COLUMNS = {
    "bits": ("bits", ".0f"),
    "objective": ("objective", "#.3g"),
    "entropy, bits": ("entropy", ".2f"),
    "zeros": ("zeros", ".1%"),
}


def sample(folder: Folder) -> str:
    """The beginning of the held-out text, each token shaded by what it cost."""
    profile, result = folder.profile, folder.result
    if profile is None or result not in profile.stages:
        return ""
    bits = profile.stages[result].sample
    spans = [
        parts.span(_visible(text), cost / _DEAREST, f"{cost:.2f} bits")
        for text, cost in zip(profile.texts, bits, strict=True)
        if text
    ]
    scale = [
        parts.span(f"{cost} bits" if cost < _DEAREST else f"{cost} and more", cost / _DEAREST, "")
        for cost in (0, 3, 6, 9, 12)
    ]
    size = sum(map(len, profile.pieces))
    says = (
        f"The first {len(bits)} tokens: {size:,} bytes for {bits.sum() / 8:,.0f}, "
        f"{bits.sum() / max(size, 1):.2f} bits per byte. The darker a token, the less it was expected."
    )
    shades = f'<div class="scale" aria-hidden="true">{"".join(scale)}</div>'
    return f'<p class="quiet">{says}</p>{shades}<div class="text">{"".join(spans)}</div>'


def _visible(text: str) -> str:
    """Letters as they are; what a page would swallow or obey is shown by a sign."""
    return "".join(
        "↵\n" if c == "\n" else "→\t" if c == "\t" else c if c.isprintable() or c == " " else f"⟨{ord(c):x}⟩"
        for c in text
    )


def journal(folder: Folder) -> str:
    """The facts in order, and when each was booked; those of single matrices stand in the tables above."""
    shown = [row for row in folder.journal if not str(row["fact"]).startswith("quant.")]
    left_out = max(len(shown) - 2 * _FACTS, 0)
    if left_out:
        shown = [*shown[:_FACTS], {"fact": f"… {left_out:,} more in the journal"}, *shown[-_FACTS:]]
    if not shown:
        return ""
    begun = next((at for row in shown if (at := number(row.get("time"))) is not None), 0.0)
    lines = []
    for row in shown:
        at = number(row.get("time"))
        said = ", ".join(f"{key} {_plain(value)}" for key, value in row.items() if key not in ("fact", "time"))
        said = said if len(said) <= _VALUE else said[:_VALUE] + " …"
        lines.append(
            ("" if at is None else f"{at - begun:,.1f}", str(row["fact"])[:80], f"<td><code>{escape(said)}</code></td>")
        )
    inside = parts.table(("after s", "fact", "what it says"), lines, ("after s",))
    return f'<details class="journal"><summary>{len(folder.journal):,} facts</summary><div>{inside}</div></details>'


def _plain(value: Any) -> str:
    figure = number(value)
    if isinstance(value, float) and figure is not None:
        return f"{figure:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
