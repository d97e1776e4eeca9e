"""What a document is scored with depends on which rank, thread or process happened to claim which part first."""

import functools

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.flow.events import Update
from fairway.audit.terms.program import Program
from fairway.audit.terms.term import Term, walk
from fairway.audit.terms.things import Event
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding, Place

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
    claims = [event for event in _claims(program) if any(_together(event, step) for step in steps)]
    if not claims:
        return clean_as_read(case, ID, CLAUSE, "no lock, claim file or shared queue stands in a loop that adapts")
    claim = claims[-1]
    place, way = case.reading.place(claim.term), case.reading.way(claim.term)
    carried = _carried(case, claim, [step for step in steps if _together(claim, step)])
    if carried is None:
        evidence = (
            "Documents are claimed in the order in which workers come, each with an adapter of its own; the order is "
            "not fixed beforehand."
        )
        return departure(case, "documents-claimed-by-ranks", CLAUSE, evidence, place, way)
    evidence = (
        "Parts of the text are claimed by whichever worker comes first, and the state that learns from them is carried "
        "on to the next claim: scores depend on a race that nobody can replay."
    )
    return Finding(ID, "violates", evidence, CLAUSE, place, (*way, *case.reading.way(carried.term)[1:]))


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
    return term.receiver is not None and any(
        t.op == "call" and t.called in ("TCPStore", "FileStore", "HashStore", "PrefixStore", "get_store")
        for t in walk(term.receiver)
    )


def _together(claim: Event, step: Event) -> bool:
    """Whether a step is taken in the loop that the claim stands in."""
    return claim.path[: claim.within] == step.path[: claim.within] and step.loops >= claim.loops


def _carried(case: Case, claim: Event, steps: list[Event]) -> Event | None:
    """The last step whose state was made before the claim, and not set to its beginning since."""
    for step in reversed(steps):
        if step.order < claim.order or step.term.called != "step":
            continue
        made = [t.value.order for t in walk(step.term) if t.op == "object"]
        if any(order < claim.order for order in made) and not _begun_anew(case, case.reading.place(step.term)):
            return step
    return None


def _begun_anew(case: Case, step: Place) -> bool:
    """Whether all that learns in a line is made, or set to its beginning, in a loop around it: an adapter that is
    used again."""
    updates = [update for update in case.trace.updates if update.place == step and update.state is not None]
    return bool(updates) and all(map(functools.partial(_begun, case), updates))


def _begun(case: Case, update: Update) -> bool:
    assert update.state is not None
    root = update.state.root
    if root.born:
        return True
    return any(one is root and nest[:1] == update.nest[:1] and nest for one, nest in case.trace.begun)
