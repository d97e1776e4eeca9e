"""What many rules say in the same words."""

from fairway.audit.case import Case
from fairway.audit.terms.octets import counts_bytes
from fairway.audit.terms.report import is_assumed
from fairway.audit.terms.term import Term
from fairway.audit.verdict import Finding, Place


def clean(rule: str, clause: str, evidence: str) -> Finding:
    return Finding(rule, "clean", evidence, clause)


def clean_as_read(case: Case, rule: str, clause: str, evidence: str) -> Finding:
    """Clean, unless the script runs code that nobody can read and says no score in what can be read."""
    gaps = [(script, gap) for script in case.script.all() for gap in script.opaque]
    if not gaps or case.reading.reported:
        return clean(rule, clause, evidence)
    script, gap = gaps[0]
    place = Place(script.path, script.line(gap.line))
    return Finding(rule, "cannot tell", f"the script runs code that cannot be read: {gap.why}", clause, place)


def unsaid(rule: str, clause: str) -> Finding:
    return Finding(rule, "cannot tell", "no number made of losses is said by the script", clause)


def unseen(case: Case, rule: str, clause: str) -> Finding:
    """The score is not said, or what it divides by could not be followed."""
    reading = case.reading
    if not reading.reported:
        return unsaid(rule, clause)
    place = reading.place(reading.reported[-1].event.term)
    evidence = f"the number said at line {place.line} could not be followed to the bytes that it divides by"
    return Finding(rule, "cannot tell", evidence, clause, place)


def counted_otherwise(case: Case, rule: str, clause: str) -> Finding:
    """For rules of the tables: the score divides by no count of bytes that could be read."""
    if any(is_assumed(fraction) is not None for _, fraction in case.reading.fractions):
        return clean(rule, clause, "bytes are not counted by pieces of the vocabulary")
    return unseen(case, rule, clause)


def byte_factors(case: Case) -> list[Term]:
    """What the score divides by that counts bytes."""
    found = [term for term in case.reading.denominators if counts_bytes(term)]
    if not found:  # a count may stand above: loss * tokens / bytes read the other way round
        ups = [term for _, fraction in case.reading.fractions for term in fraction.up]
        found = [term for term in ups if not case.reading.is_loss(term) and counts_bytes(term)]
    if not found and not any(is_assumed(fraction) for _, fraction in case.reading.fractions):
        found = [number.term for number in case.reading.reported if counts_bytes(number.term)]
    return found
