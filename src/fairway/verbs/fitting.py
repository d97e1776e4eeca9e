"""Bytes: integers that fit a budget, and what each coder makes of them."""

import json as json_text
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fairway import steps
from fairway.artifact import open_artifact
from fairway.artifact.compare import compare as compared
from fairway.artifact.integers import read_integers
from fairway.base import tables
from fairway.base.devices import choose
from fairway.base.errors import RecipeError
from fairway.base.files import write
from fairway.base.ranks import Ranks
from fairway.base.slots import kind_of
from fairway.base.specs import to_plain
from fairway.lab.submit import train_script
from fairway.lab.tradeoff import draw
from fairway.quant.observe import read_hessians
from fairway.score.evaluate import model_on
from fairway.steps.budgeting import fit_in, on_training_text
from fairway.steps.fitting import Fit, Subject
from fairway.steps.products import product
from fairway.verbs.opening import recipe_of, run_of
from fairway.verbs.printing import table

WIDTH = 24  # characters of the longest bar


def fit(
    folder: Path,
    budget: int,
    overrides: tuple[str, ...],
    code: bool,
    text: int,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    chosen = recipe_of(folder, overrides)
    target = out or folder / f"fit-{budget}"
    if (target / steps.RECIPE).exists():
        raise RecipeError(f"{target}: a run, whose own artifact stays; name another folder with -o")
    if foreign := [word for word in overrides if not word.startswith(("quant.", "pack."))]:
        raise RecipeError(f"--set {foreign[0]}: a fit takes the run as it is; only quant.* and pack.* may differ")
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        hardware = choose(device)
        taken = len(train_script(chosen)) if code else 0
        model = model_on(open_artifact(product(opened, steps.WEIGHTS)), hardware)
        read = read_hessians(product(opened, steps.HESSIANS)).items()
        subject = Subject.of(model, chosen.quant, {name: h.to(hardware.torch) for name, h in read}, opened)
        found = fit_in(target, chosen, opened, subject, taken, budget)
        scored = on_training_text(subject, found.points, chosen, opened, text) if text else []
    facts = {**_facts(folder, target, found, scored, taken), "budget": budget}
    write(target / "fit.json", json_text.dumps(facts, indent=2) + "\n")
    write(target / "quant.toml", tables.dump({"quant": to_plain(found.spec)}))
    picture = draw(target / "tradeoff.svg", found.points, scored, found.found.bytes, budget - taken)
    if as_json:
        print(json_text.dumps(facts, indent=2))
    else:
        _show(found, scored, target, picture)
        said = [*overrides, f"quant.fit.budget={budget}", *(["quant.fit.code=true"] if code else [])]
        settings = " ".join(f"--set {shlex.quote(word)}" for word in said)
        print(f"as part of a run: fairway run {shlex.quote(str(folder / steps.RECIPE))} {settings}")


def compare(folder: Path, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        tensors = read_integers(product(opened, steps.INTEGERS))
        vocab = open_artifact(product(opened, steps.WEIGHTS)).vocab
        rows = compared(tensors, chosen.model, vocab, opened)
    if as_json:
        print(json_text.dumps([row.plain() for row in rows], indent=2))
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("group")
    drawn.add_column("coder")
    for title in ("bytes", "order-0 entropy", "bytes / entropy", "its model", "encode s", "decode s"):
        drawn.add_column(title, justify="right")
    for row in rows:
        share = f"{row.bytes / row.order0_bytes:.4f}" if row.order0_bytes else "-"
        model = "-" if row.model_bytes is None else f"{row.model_bytes:,.0f}"
        sizes = (f"{row.bytes:,}", f"{row.order0_bytes:,.0f}", share, model)
        drawn.add_row(row.group, row.coder, *sizes, f"{row.encode_seconds:.2f}", f"{row.decode_seconds:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)
    least = min((row for row in rows if row.group == "total"), key=lambda row: row.bytes)
    print(f"smallest: {least.coder}, {least.bytes:,} bytes; this run packs with {kind_of(chosen.pack.coder)}")


def _facts(folder: Path, target: Path, found: Fit, scored: list[float], taken: int) -> dict[str, Any]:
    points = [{"bytes": round(point.bytes), "damage": point.damage} for point in found.points]
    for point, bits in zip(points, scored, strict=False):
        point["training_bits_per_byte"] = bits
    where = {"run": str(folder), "artifact": str(target / steps.ARTIFACT), "code_bytes": taken}
    return {**where, **found.plain(), "tradeoff": points}


def _show(found: Fit, scored: list[float], target: Path, picture: bool) -> None:
    fitted = found.found
    rows = []
    for row in found.plain()["choices"]:
        where = row["part"] if row["layer"] is None else f"{row['part']} {row['layer']}"
        remark = f"int{row['bits']}, clip {row['k']:.2f} rms, dead zone {row['dead_zone']:g}; {row['damage']:.5f} nats"
        rows.append((where, f"{row['bits_per_weight']:.3f}", remark))
    table("tensor", "bits per weight", rows)
    most = max(point.bytes for point in found.points)
    curve = []
    for i, point in enumerate(found.points):
        bits = f"; {scored[i]:.4f} bits per byte of training text" if scored else ""
        bar = "█" * max(1, round(WIDTH * point.bytes / most))
        curve.append((f"{round(point.bytes):,} bytes", f"{point.damage:.4f}", f"{bar}{bits}"))
    table("trade-off", "nats per token, expected", curve)
    share = f"{fitted.bytes / fitted.budget:.2%}"
    how = f"{share}: the largest useful file, there are no finer grids" if fitted.full else share
    print(
        f"{target / steps.ARTIFACT}: {fitted.bytes:,} bytes of {fitted.budget:,} ({how}); damage {fitted.damage:.5f} "
        f"nats per token; {fitted.writings} written, {fitted.solves} solved, {found.seconds:.1f} s"
    )
    if found.spec.repair.kind != "none":
        repair = found.spec.repair
        print(f"repaired at rank {repair.rank}: {repair.count} of the tensors with the largest error")
    drawn = f"drawn in {target / 'tradeoff.svg'}" if picture else "for a picture: pip install 'fairway[report]'"
    print(f"{drawn}; the plan: {target / 'quant.toml'}")
