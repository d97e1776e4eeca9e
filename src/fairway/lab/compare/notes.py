"""What a reader must know of a comparison: stages that differ, tokens, versions of the code, what was not tested."""

from collections.abc import Sequence

from fairway.lab.compare.approaches import Approach
from fairway.lab.compare.result import Compared
from fairway.lab.compare.same import booked, steps_of


def notes_of(found: Sequence[Approach], base: Approach, stage: str, rows: Sequence[Compared]) -> list[str]:
    """In sentences."""
    notes = []
    stages = {row.stage: [each.label for each in rows if each.stage == row.stage] for row in rows}
    if len(stages) > 1:
        told = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in stages.items())
        notes.append(f"Each approach's own result, of different stages ({told}); --stage compares one of all.")
    if len({booked(run, stage)["tokens"] for one in found for run in one.runs}) > 1:
        notes.append(f"Token counts differ: nats of differences are per token of {base.label}.")
    every = [run for one in found for run in one.runs]
    for fact, keys, told in (
        ("code", ("sha256",), "versions of the code"),
        ("device", ("device", "processor", "torch", "threads", "ranks"), "kinds of device, library or threads"),
    ):
        made = {tuple(str(run.facts.get(fact, {}).get(key)) for key in keys) for run in every}
        if len(made) > 1:
            mixed = [one.label for one in found if len({str(run.facts.get(fact)) for run in one.runs}) > 1]
            within = f" ({', '.join(mixed)}: within one approach)" if mixed else ""
            notes.append(f"These runs were made by {len(made)} {told}{within}.")
    if len({steps_of(run) for run in every}) > 1:
        notes.append("Step counts differ: these runs share the clock.")
    notes += _notes_by_document([row for row in rows if row.against is not None])
    if any(len(one.runs) == 1 for one in found):
        few = ", ".join(one.label for one in found if len(one.runs) == 1)
        notes.append(f"One seed: {few}; no deviation, no test over seeds.")
    return notes


def _notes_by_document(rows: Sequence[Compared]) -> list[str]:
    tests = {row.label: row.against.by_document for row in rows if row.against is not None}
    told = {label: f"{len(test.seeds)} of {label}" for label, test in tests.items() if test.difference is not None}
    without = [f"{label} ({test.why})" for label, test in tests.items() if test.difference is None]
    notes = []
    if told:
        count = max(test.documents for test in tests.values())
        notes.append(
            f"By document: {count:,} documents, each averaged over the seeds in common: {', '.join(told.values())}."
        )
    if without:
        remedy = "; `fairway score RUN` writes a profile" * any(test.why == "no profile" for test in tests.values())
        notes.append(f"Not by document: {', '.join(without)}{remedy}.")
    return notes
