"""Code that is executed and that nobody can read: what it does is not known, so nothing about it is called clean."""

from fairway.audit.case import Case
from fairway.audit.verdict import Finding, Place

ID = "opaque-code"
CHARGE = "A part of what is executed cannot be read."
CLAUSE = "R8, R11: what is scored must be open to review"


def check(case: Case) -> Finding:
    """Cannot tell at the first text that stays closed; clean where everything that is executed was read."""
    scripts = list(case.script.all())
    for script in scripts:
        if script.unreadable:
            place = Place(script.path, script.line(script.unreadable.line))
            return Finding(
                ID,
                "cannot tell",
                f"{place} is executed and cannot be read: {_why(script.unreadable.why)}",
                CLAUSE,
                place,
            )
    gaps = [(script, gap) for script in scripts for gap in script.opaque]
    if gaps:
        script, gap = gaps[0]
        place = Place(script.path, script.line(gap.line))
        more = f" ({len(gaps) - 1} more such places)" if len(gaps) > 1 else ""
        return Finding(ID, "cannot tell", f"{_why(gap.why)}{more}", CLAUSE, place)
    layers = [script.path for script in scripts if "!" in script.path]
    read = f"; unpacked and read as text: {', '.join(layers)}" if layers else ""
    return Finding(ID, "clean", f"all {len(scripts)} texts that are executed were read{read}", CLAUSE)


def _why(why: str) -> str:
    return why[:1].upper() + why[1:]
