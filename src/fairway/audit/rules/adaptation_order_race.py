"""What a document is scored with depends on which rank, thread or process happened to claim which part first."""

from collections.abc import Iterator
from dataclasses import replace

from fairway.audit.case import Case
from fairway.audit.exemptions import Made, departures
from fairway.audit.passes.claims import learning_in, sorted_by_length, yields
from fairway.audit.terms.program import Program
from fairway.audit.terms.term import Below, Term, walk
from fairway.audit.terms.things import Event
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding, Step

ID = "adaptation-order-race"
CHARGE = "the order of adaptation is decided by a race for a lock, a file or a queue"
CLAUSE = "RULES.md (b) 4 and last list (documents handed to ranks dynamically)"

_LOCKS = (
    "fcntl.flock",
    "fcntl.lockf",
    "filelock.",
    "portalocker.",
    "os.rename",
    "os.replace",
    "os.link",
    "os.mkdir",
    "os.open",
)
_QUEUES = frozenset(("popleft", "get_nowait", "pop", "get"))
_STEPS = frozenset(("step", "backward"))


def check(case: Case) -> Finding:
    program = case.reading.entry
    steps = [event for event in program.called(*_STEPS) if event.path]
    found = [_where_used(case, event) for event in _claims(program)]
    claims = [event for event in found if any(_together(event, step) for step in steps)]
    ordered = list(_by_length(case))
    if not claims:
        if ordered:
            return departures(case, CLAUSE, ordered)
        return clean_as_read(case, ID, CLAUSE, "no lock, claim file or shared queue stands in a loop that adapts")
    claim = claims[-1]
    place, way = case.reading.place(claim.term), case.reading.way(claim.term)
    walked = learning_in(case, claim.path[claim.within - 1]) if claim.within else None
    if walked is not None:
        carried = walked[1].place if walked[1] is not None else None
    else:
        kept = _carried(claim, [step for step in steps if _together(claim, step)])
        carried = case.reading.place(kept.term) if kept is not None else None
    if carried is None:
        evidence = (
            "Documents are claimed in the order in which workers come, each with an adapter of its own; the order is "
            "not fixed beforehand."
        )
        return departures(case, CLAUSE, [Made("documents-claimed-by-ranks", evidence, place, way), *ordered])
    evidence = (
        "Parts of the text are claimed by whichever worker comes first, and the state that learns from them is carried "
        "on to the next claim: scores depend on a race that nobody can replay."
    )
    return Finding(ID, "violates", evidence, CLAUSE, place, (*way, Step(carried, "what is carried on learns here")))


def _by_length(case: Case) -> Iterator[Made]:
    place = sorted_by_length(case)
    if place is not None:
        evidence = (
            f"Documents are sorted by their lengths at {place}, and what scores them learns in that order: lengths are "
            "not known before the text is read."
        )
        yield Made("documents-by-length", evidence, place)


def _claims(program: Program) -> list[Event]:
    """Locks and claims in loops; what threads take from a shared queue."""
    found = [event for event in program.events if str(event.term.value).startswith(_LOCKS) and event.loops]
    threads = {name for event in program.called("Thread", "Process", "submit") for name in _targets(event.term)}
    for event in program.called(*_QUEUES):
        if threads & set(event.path) and event.loops and event.term.receiver is not None:
            found.append(event)
    found += [event for event in program.called("add", "compare_set") if _is_store(event.term) and event.loops]
    return sorted(found, key=lambda event: event.order)


def _targets(term: Term) -> list[str]:
    named = [term.argument("target"), *(part for part in term.parts[:2])]
    return [part.value.name for part in named if part is not None and part.op == "function"]


def _is_store(term: Term) -> bool:
    """A counter that ranks share through the process group's store: made as such, or counted up by its name."""
    key, amount = term.argument(0), term.argument(1)
    named = key is not None and (key.op == "text" or isinstance(key.constant(), str))
    counted = amount is not None and type(amount.constant()) is int
    if term.receiver is not None and named and counted:  # store.add("claims", 1); a set's add has no amount
        return True
    return term.receiver is not None and _made_a_store(term.receiver)


_made_a_store = Below(lambda term: term.called in ("TCPStore", "FileStore", "HashStore", "PrefixStore", "get_store"))


def _where_used(case: Case, claim: Event) -> Event:
    """A claim that a generator makes stands in the loop that goes through what it yields."""
    inside = claim.within - 1
    return replace(claim, within=inside) if inside > 0 and yields(case, claim.path[inside]) else claim


def _together(claim: Event, step: Event) -> bool:
    """Whether a step is taken in the loop that the claim stands in."""
    return claim.path[: claim.within] == step.path[: claim.within] and step.loops >= claim.loops


def _carried(claim: Event, steps: list[Event]) -> Event | None:
    """The last step whose state was made before the claim."""
    for step in reversed(steps):
        if step.order < claim.order or step.term.called != "step":
            continue
        made = [t.value.order for t in walk(step.term) if t.op == "object"]
        if any(order < claim.order for order in made):
            return step
    return None
