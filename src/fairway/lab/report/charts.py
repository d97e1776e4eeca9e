"""The pictures of a run: training, the score along the text and by length, what adapting won."""

from collections.abc import Sequence

import numpy as np

from fairway.lab.report.curves import Curve, smoothed
from fairway.lab.report.folder import Folder
from fairway.lab.report.pictures import ACCENT, FAINT, QUIET, Sheet, named

NAMES = {"float": "float", "quantized": "quantised", "sliding": "sliding", "adapted": "adapted"}
_SMOOTH = 17  # drawn points that a trend is the mean of
_GROUPS = 8  # of documents by length


def training(folder: Folder, sheet: Sheet) -> list[str]:
    """Loss, rate and gradient norm against time, and the same against tokens."""
    curve = folder.curve
    if len(curve.stretches) < 2:
        return []
    per_step = folder.figure("train", "batch_tokens")
    seconds, tokens = curve.column("seconds"), [step * (per_step or 1) for step in curve.column("steps")]
    return [
        _training(curve, sheet, *_scaled(seconds, _TIME), "time"),
        _training(curve, sheet, *_scaled(tokens, _TOKENS if per_step else _STEPS), "tokens" if per_step else "steps"),
    ]


def _training(curve: Curve, sheet: Sheet, across: list[float], label: str, against: str) -> str:
    norm = curve.column("norm")
    figure, panels = sheet.axes(4.6 if norm else 3.6, (3, 1, 1.3) if norm else (3, 1))
    loss, trend = curve.column("loss"), smoothed(curve.column("loss"), _SMOOTH)
    panels[0].fill_between(across, curve.column("low"), curve.column("high"), color=FAINT, alpha=0.35, linewidth=0)
    panels[0].plot(across, loss, color=FAINT, linewidth=0.7)
    panels[0].plot(across, trend, color=ACCENT)
    panels[0].set_ylim(*_range(loss, trend))
    named(panels[0], "loss, nats per token")
    panels[1].fill_between(across, curve.column("scale"), color=FAINT, alpha=0.35, linewidth=0)
    panels[1].plot(across, curve.column("scale"), color=QUIET, linewidth=1.2)
    panels[1].set_ylim(0, None)
    named(panels[1], "learning rate, of its peak")
    if norm:
        panels[2].plot(across, norm, color=FAINT, linewidth=0.7)
        panels[2].plot(across, smoothed(norm, _SMOOTH), color=QUIET, linewidth=1.2)
        panels[2].set_ylim(0, 1.1 * float(np.quantile(norm, 0.99)) or 1.0)
        named(panels[2], "gradient norm, before clipping")
    panels[-1].set_xlabel(label)
    panels[-1].set_xlim(0, across[-1])
    says = f"Training against {against}: the loss goes from {loss[0]:.2f} to {trend[-1]:.2f} nats per token"
    return sheet.picture(figure, f"Training against {against}", f"{says}, in {curve.step:,} steps.")


def along(folder: Folder, sheet: Sheet) -> str:
    """Bits per byte of every stretch of the text, and the score so far."""
    profile, result = folder.profile, folder.result
    if profile is None or result not in profile.stages:
        return ""
    sizes = profile.buckets[1].astype(float)
    across, label = _scaled(list(np.cumsum(sizes)), _BYTES)
    figure, (axes,) = sheet.axes(2.9)
    here = profile.stages[result].buckets / np.maximum(sizes, 1)
    axes.plot(across, here, color=FAINT, linewidth=0.8, label="each stretch")
    for stage, bits in profile.stages.items():
        if stage in ("quantized", result):
            so_far = np.cumsum(bits.buckets) / np.cumsum(np.maximum(sizes, 1))
            colour, width = (ACCENT, 1.8) if stage == result else (QUIET, 1.2)
            axes.plot(across, so_far, color=colour, linewidth=width, label=f"so far, {NAMES.get(stage, stage)}")
    axes.set(xlabel=label, xlim=(0, across[-1]), ylim=_range(list(here), []))
    named(axes, "bits per byte")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, handlelength=1.2, columnspacing=1.2)
    says = f"Bits per byte of {len(here)} stretches of the text, from {here.min():.2f} to {here.max():.2f}."
    return sheet.picture(figure, "Score along the text", says)


def by_length(folder: Folder, sheet: Sheet) -> str:
    """Bits per byte of the documents, one dot each, and of groups of equal count by length."""
    profile, result = folder.profile, folder.result
    if profile is None or result not in profile.stages or profile.documents.shape[1] < 2:
        return ""
    sizes, bits = profile.documents[2].astype(float), profile.stages[result].documents
    kept = sizes > 0
    sizes, bits = sizes[kept], bits[kept]
    order = np.argsort(sizes, kind="stable")
    sizes, bits = sizes[order], bits[order]
    figure, (axes,) = sheet.axes(2.9)
    shown = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), 400)).astype(int))
    axes.plot(sizes[shown], (bits / sizes)[shown], "o", color=FAINT, markersize=3, label="a document")
    groups = [part for part in np.array_split(np.arange(len(sizes)), min(_GROUPS, len(sizes))) if len(part)]
    middle = [float(np.exp(np.log(sizes[part]).mean())) for part in groups]
    means = [float(bits[part].sum() / sizes[part].sum()) for part in groups]
    axes.plot(middle, means, "o-", color=ACCENT, markersize=4, label=f"{len(groups)} groups of equal count")
    axes.set(xscale="log", xlabel="bytes of the document", ylim=_range(list((bits / sizes)[shown]), means))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.xaxis.set_minor_formatter("")
    named(axes, "bits per byte")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, handlelength=1.2)
    says = f"Bits per byte by length: {means[0]:.2f} in the shortest group, {means[-1]:.2f} in the longest."
    return sheet.picture(figure, "Score by length of the document", says)


def gain(folder: Folder, sheet: Sheet) -> str:
    """What adapting saved along the text against the same windows without it, in bytes, summed."""
    profile = folder.profile
    if profile is None or not {"sliding", "adapted"} <= set(profile.stages):
        return ""
    saved = np.cumsum(profile.stages["sliding"].buckets - profile.stages["adapted"].buckets) / 8
    sizes = np.cumsum(profile.buckets[1].astype(float))
    across, label = _scaled(list(sizes), _BYTES)
    figure, panels = sheet.axes(3.6, (1, 1))
    panels[0].plot([0, *across], [0, *saved], color=ACCENT)
    named(panels[0], "bytes saved so far")
    here = np.diff(saved, prepend=0) * 8 / np.maximum(profile.buckets[1], 1)
    panels[1].axhline(0, color=QUIET, linewidth=0.8)
    panels[1].plot(across, here, color=FAINT, linewidth=0.7)
    panels[1].plot(across, smoothed(list(here), _SMOOTH), color=QUIET, linewidth=1.2)
    panels[1].set(xlabel=label, xlim=(0, across[-1]), ylim=_range(list(here), []))
    named(panels[1], "bits per byte saved, each stretch")
    says = f"Adapting saves {saved[-1]:,.0f} bytes of {profile.stages['sliding'].buckets.sum() / 8:,.0f}."
    return sheet.picture(figure, "Gain of test-time training", says)


def _range(values: Sequence[float], inside: Sequence[float]) -> tuple[float, float]:
    """Limits that hold all but the wildest of the values, and all of `inside`."""
    low, high = (float(np.quantile(values, share)) for share in (0.005, 0.99))
    low, high = min(low, *inside, low), max(high, *inside, high)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


_Unit = tuple[tuple[float, str], ...]
_TIME: _Unit = ((1, "seconds"), (60, "minutes"), (3600, "hours"))
_TOKENS: _Unit = ((1, "tokens"), (1e3, "thousand tokens"), (1e6, "million tokens"), (1e9, "billion tokens"))
_STEPS: _Unit = ((1, "steps"),)
_BYTES: _Unit = ((1, "bytes of text"), (1e3, "KB of text"), (1e6, "MB of text"))


def _scaled(values: list[float], units: _Unit) -> tuple[list[float], str]:
    """The values in the greatest unit of which the last one is three or more, and that unit's name."""
    size, name = [unit for unit in units if values[-1] >= 3 * unit[0] or unit[0] == 1][-1]
    return [value / size for value in values], name


def _short(value: float) -> str:
    for size, letter in ((1e6, " MB"), (1e3, " KB")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
