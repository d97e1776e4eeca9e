"""What a run weighs, and how it is handed in."""

import json as json_text
from pathlib import Path

from fairway.base.errors import ContractError, RecipeError
from fairway.base.ranks import Ranks
from fairway.lab import submit as lab
from fairway.verbs.opening import recipe_of, run_of
from fairway.verbs.printing import table


def weigh(folder: Path, as_json: bool) -> None:
    chosen = recipe_of(folder)
    with run_of(chosen, folder.parent, Ranks(), as_json, folder) as opened:
        found = lab.weigh(chosen, opened, lab.checkout())
    if as_json:
        print(json_text.dumps(found.plain(), indent=2))
    else:
        table(f"{chosen.name}, seed {chosen.seed}", "bytes", found.rows())


def submit(
    runs: list[Path],
    out: Path | None,
    update: Path | None,
    check: Path | None,
    replaces: Path | None,
    bar: float | None,
    author: str,
    github: str,
    home: Path,
    device: str,
    as_json: bool,
) -> None:
    if sum(place is not None for place in (out, update, check)) != 1:
        raise RecipeError("fairway submit: one of -o FOLDER (a new record), --update FOLDER and --check FOLDER")
    if check is not None:
        if runs:
            raise RecipeError("fairway submit --check: takes no run folders; --runs says where they lie")
        _check(check, home, device, as_json)
        return
    folder = out or update
    assert folder is not None
    record = lab.submit(runs, folder, replaces, bar, author, github, update is not None)
    if as_json:
        print(json_text.dumps(record, indent=2))
        return
    rows = [
        (
            f"seed {row['seed']}" + (" (superseded)" if row["superseded"] else ""),
            f"{row['val_bpb']:.4f}",
            f"base {row['base_bpb']:.4f}, {row['total_bytes']:,} bytes of {row['budget_bytes']:,}, {row['run']}",
        )
        for row in record["runs"]
    ]
    table(str(record["name"]), "bits per byte", rows)
    print(f"record: {folder}; next: fairway submit --check {folder}")


def _check(folder: Path, home: Path, device: str, as_json: bool) -> None:
    found = lab.check(folder, home, device)
    ours = found.losses["script"]
    made_by = {
        "checkout": "this code, the record's own,",
        "commit": f"the code of {found.commits['record']}",
        "other": f"this code (the record's, {found.commits['record']}, is not at hand)",
    }[found.made_by]
    if as_json:
        print(json_text.dumps(found.plain(), indent=2))
    else:
        kind = "to the bit: the run's own hardware" if found.exact else f"within {lab.CLOSE:g}: other hardware"
        rebuilt = [(name, _said(same), f"the bytes that {made_by} makes") for name, same in found.rebuilt.items()]
        rows = [
            *rebuilt,
            ("score", _said(found.same_score), f"{found.scores['script']!r} bits for {found.text_bytes:,} bytes"),
            ("losses", _said(found.same_losses), f"{len(ours)} of the first steps, {kind}; seed {found.seed}"),
            ("code", found.made_by, f"record {found.commits['record']}, this checkout {found.commits['code']}"),
            ("importable", str(len(found.importable)), "packages that requirements.txt brings; all others are hidden"),
        ]
        table("check", "", rows)
    wrong = [name for name, same in found.rebuilt.items() if not same]
    if wrong:
        parts = ", ".join(found.differing[:4]) or "the readable lines"
        parts += f" and {len(found.differing) - 4} more" if len(found.differing) > 4 else ""
        raise ContractError(
            f"{folder}: {made_by} makes another {' and '.join(wrong)} ({parts})"
            + ("; check where git has the commit" if found.made_by == "other" else "; the record was altered")
        )
    if not found.same_score:
        raise ContractError(
            f"{folder}: score.py gives {found.scores['script']!r} bits, not {found.scores['package']!r}"
        )
    if not found.same_losses:
        raise ContractError(f"{folder}: train_gpt.py's first losses are not the run's; see --json")


def _said(same: bool) -> str:
    return "same" if same else "DIFFERS"
