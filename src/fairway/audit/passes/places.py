"""Where a reader should look: the line of a fault that a reviewer would point at."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from fairway.audit.case import Case
from fairway.audit.flow.events import Choice, Event, Forward, Score, Trace, Update, bits
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.extents import extent_of
from fairway.audit.passes.faults import Fault
from fairway.audit.passes.patterns import handed_at, names_given, naming, pattern_at, put_in_place
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.verdict import Place


def place_of(case: Case, fault: Fault) -> Place:
    """Where a reader should look."""
    if fault.kind == "two-pass-cache" and isinstance(fault.cause, Update):
        filled = _filled(case, fault.cause, fault.score)
        if filled is not None:
            return extent_of(case, fault.cause, parting_of(fault.cause, fault.score), filled)
    if fault.kind in ("rescoring-after-adaptation", "two-pass-cache") and isinstance(fault.cause, Update):
        place = parting_of(fault.score, fault.before or fault.cause)
        return _repeated(case.trace, fault) if place == fault.score.place else place
    if fault.kind == "multi-epoch-last":
        return _loop_again(case.trace, fault)
    if fault.kind == "calibration-on-validation" and isinstance(fault.cause, Update):
        return _calibrated(case, fault.cause, fault.score)
    if fault.kind == "slot-on-scored" and isinstance(fault.cause, Update):
        return _objective(case.trace, fault.cause)
    if fault.kind == "validation-in-training" and isinstance(fault.cause, Update):
        taken = _handed_on(case, fault.cause, fault.score) or _taken_in(case, fault.cause, fault.score)
        taken = taken or _called_as_well(case, fault.cause) or _brought_in(case, fault.cause, fault.score)
        return taken or _parted(case.trace, fault.cause) or fault.cause.place
    if fault.kind in ("training-before-scoring", "slot-shared-delta") and isinstance(fault.cause, Update):
        shared = fault.cause.state if fault.kind == "slot-shared-delta" else None
        if shared is not None and "#broadcast" in shared.slots and isinstance(shared.place, Place):
            return shared.place  # made for all windows, as its shape says; else it is handed all of them
        return _apart_from_training(case, fault.cause, parting_of(fault.cause, fault.score))
    if fault.kind == "temperature-from-validation":  # where it is set: the call of what fits it, or what picks it
        cause = fault.cause
        picked = isinstance(cause, Choice) and cause.form != "if" and not _given_back(case, cause.place)
        return cause.place if picked else _inside_a_maker(case, cause, parting_of(cause, fault.score))
    return fault.cause.place


def _apart_from_training(case: Case, update: Update, place: Place) -> Place:
    """The first line of an update's way, from a place on, by which no step on training text goes: who calls the whole
    training does not say what it does besides."""
    kinds = passes_of(case)[0].data
    trained = [each.stack for each in case.trace.updates if each.how == "gradient" and _is_trained(each, kinds)]
    at = update.stack.index(place) if place in update.stack else len(update.stack) - 1
    while at < len(update.stack) - 1 and any(way[: at + 1] == update.stack[: at + 1] for way in trained):
        at += 1
    return update.stack[at] if place in update.stack else place


def _is_trained(update: Update, kinds: frozenset[str]) -> bool:
    return not any(tok.data in kinds for tok in update.learned)


def _given_back(case: Case, place: Place) -> bool:
    """Whether a line gives something back to who called: `return min(losses, key=losses.get)`."""
    return any(
        isinstance(node, ast.Return) and script.line(node.lineno) == place.line
        for script in case.script.all()
        if script.path == place.file and script.tree is not None
        for node in nodes(script.tree)
    )


def _inside_a_maker(case: Case, event: Event, place: Place) -> Place:
    """The line of an event's way in the `__init__` that a line calls, if it calls one: who makes an object does not say
    what it does at once."""
    at = event.stack.index(place) if place in event.stack[:-1] else -1
    inner = event.stack[at + 1]
    first, last = function_around(case, inner)
    makers = (
        node
        for script in case.script.all()
        if script.path == inner.file and script.tree is not None
        for node in nodes(script.tree)
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__")
        if (script.line(node.lineno), script.line(node.end_lineno or node.lineno)) == (first, last)
    )
    return inner if at >= 0 and next(makers, None) is not None else place


def _called_as_well(case: Case, update: Update) -> Place | None:
    """The call of what takes a step on validation tokens, where the evaluation calls it, too, from elsewhere."""
    data = passes_of(case)[0].data
    for other in case.trace.updates:
        if (
            other.place == update.place
            and other.stack != update.stack
            and any(tok.data in data for tok in other.learned)
        ):
            pairs = zip(reversed(update.stack), reversed(other.stack), strict=False)
            return next((mine for mine, theirs in pairs if mine != theirs), None)
    return None


def own_call(trace: Trace, update: Update) -> Place:
    """The call that leads to an update alone, where other calls lead to its line too; else its line."""
    first = next((each for each in trace.updates if each.place == update.place and each.stack != update.stack), None)
    return update.place if first is None else parting_of(update, first)


def _own_reads(case: Case, update: Update, score: Score) -> list[int]:
    """The reads of validation tokens that an update learned from and that the evaluation did not make."""
    kinds = passes_of(case)[0].data
    scored = {tok.origin for tok in score.targets}
    return sorted({tok.origin for tok in update.learned if tok.data in kinds and tok.origin >= 0} - scored)


def _handed_on(case: Case, update: Update, score: Score) -> Place | None:
    """Where the training is handed the validation files, by the setting by which the evaluation finds them, when it
    reads them by itself."""
    reads = [case.trace.reads[tok.origin] for tok in score.targets if tok.origin >= 0]
    own = _own_reads(case, update, score)
    if not own or not reads or (case.trace.reads[own[0]].mixed and case.trace.reads[own[0]].pattern):
        return None  # by a pattern of its own
    return handed_at(case, {place for read in reads for place in read.stack})


def _taken_in(case: Case, update: Update, score: Score) -> Place | None:
    """Where the training's own validation tokens come in; None where they are those that the evaluation has read."""
    own, reads = _own_reads(case, update, score) or _as_trained_on(case), case.trace.reads
    if not own:
        return None
    first = reads[own[0]]
    if first.mixed:  # one read of both: where its pattern is written, else where its file is asked for
        asked = first.stack[-2] if len(first.stack) > 1 else first.stack[-1]
        return (pattern_at(case, first.pattern) if first.pattern else None) or asked
    mine = {reads[n].stack[:-1] for n in own}  # its header is read apart, in a line of its own
    others = {place for read in reads if read.stack[:-1] not in mine for place in read.stack}
    return next((place for place in first.stack if place not in others), None)


def _as_trained_on(case: Case) -> list[int]:
    """The reads of validation files by the very lines that read those of the training, where what was read is kept by
    its path, and so is the evaluation's as well."""
    reads, kinds = case.trace.reads, passes_of(case)[0].data
    trained = {each.stack[-2:] for each in reads if "train" in each.kinds}
    return [n for n, each in enumerate(reads) if set(each.kinds) <= kinds and each.stack[-2:] in trained]


def _brought_in(case: Case, update: Update, score: Score) -> Place | None:
    """Where the training takes what the evaluation has read, `batches = mixed(batches, val_tokens)`: the first line of
    the functions that lead to the step that says its name, and by which neither a loss of validation tokens goes nor
    the training itself."""
    kinds = passes_of(case)[0].data
    reads = [case.trace.reads[tok.origin] for tok in score.targets if tok.origin >= 0]
    known = {place for each in reads for place in each.stack}
    known |= {p for each in case.trace.scores if any(t.data in kinds for t in each.targets) for p in each.stack}
    known |= {p for each in case.trace.updates if any(t.data == "train" for t in each.learned) for p in each.stack}
    said = [place for place in naming(case, names_given(case, [each.stack for each in reads])) if place not in known]
    said = [place for place in said if not _in_a_model(case, place)]
    ways = [*[loss.stack for loss in case.trace.scored(update.losses)][:1], update.stack]
    for first, last in (function_around(case, place) for way in ways for place in reversed(way)):
        inside = sorted(place.line for place in said if first <= place.line <= last)
        if any(first <= place.line <= last for each in reads for place in each.stack):  # it is handed to many from here
            inside = [line for line in inside if line in put_in_place(case)]
        if inside:
            return Place(update.place.file, inside[0])
    return None


def _filled(case: Case, update: Update, score: Score) -> Place | None:
    """Where a table is filled: the line of its loop, the call that fills it at once, or the one of several calls that
    does it early; None where the loop that fills it scores too, and the second pass is the fault."""
    trace = case.trace
    cutting = {loop for tok in update.learned for loop, _, _ in tok.spans}
    own = [each for each in update.nest if each[0] in cutting]
    if own and any(own[0] in each.nest for each in trace.scores):
        scoring = {loop for each in trace.scores for loop, _ in each.nest}
        depth = next((trace.depth.get(loop, 0) for loop, _ in own if loop not in scoring), 0)
        return update.stack[depth - 1] if 0 < depth <= len(update.stack) else None  # turns over a group of documents
    if not own:
        together = {loop for loop, _ in update.nest} & {loop for loop, _ in score.nest}
        return None if together else _inside_a_maker(case, update, parting_of(update, score))
    depth = trace.depth.get(own[0][0], 0)
    for other in trace.updates:
        if own[0][0] in dict(other.nest) and other.stack[: depth - 1] != update.stack[: depth - 1]:
            return parting_of(update, other)
    return update.stack[depth - 1] if 0 < depth <= len(update.stack) < 12 else None


def table_filled(case: Case) -> int:
    """The line in a loop in which a table learns validation tokens, or calls what does; 0 where there is no table, or
    where several are filled in different lines."""
    kinds = passes_of(case)[0].data
    taught = [each for each in case.trace.updates if each.how == "table" and {tok.data for tok in each.learned} & kinds]
    looped = [part for each in nodes(case.body.tree) if isinstance(each, (ast.For, ast.While)) for part in each.body]
    spans = [range(part.lineno, (part.end_lineno or part.lineno) + 1) for part in looped]
    lines = {
        next((at.line for at in reversed(each.stack) if any(at.line in span for span in spans)), each.place.line)
        for each in taught
        if each.place.file == case.body.path
    }
    return lines.pop() if len(lines) == 1 else 0


def _calibrated(case: Case, update: Update, score: Score) -> Place:
    """Where the model was run on what it was calibrated on; where that was read for it alone, the line that asks for
    it."""
    kinds = {tok.data for tok in update.learned} & passes_of(case)[0].data
    runs = [
        event
        for event in case.trace.events[: update.number]
        if isinstance(event, Forward) and any(tok.data in kinds for tok in event.toks)
    ]
    runs = [run for run in runs if not _scores(case, run)] or runs
    learned = {(tok.data, tok.spans) for tok in update.learned}
    fitting = [event for event in runs if any((tok.data, tok.spans) in learned for tok in event.toks)]
    run = fitting[-1] if fitting else runs[-1] if runs else update
    for origin in _own_reads(case, update, score)[:1]:
        asked = _told_validation(case, origin) or _asked_for(case, origin)
        if asked is not None:
            return asked
    called, handed = run_for(case, run, called_at(run)), _handed_over(case, run, score)
    if handed is not None and not _trains_below(case, handed):
        return handed
    return max((place for place in (called, handed) if place in run.stack), key=run.stack.index, default=called)


def _trains_below(case: Case, place: Place) -> bool:
    """Whether steps on training text are taken in what a line calls."""
    kinds = passes_of(case)[0].data
    return any(
        each.how == "gradient" and place in each.stack and _is_trained(each, kinds) for each in case.trace.updates
    )


def _scores(case: Case, run: Event) -> bool:
    """Whether losses are made in the call in which the model is run."""
    way = tuple(place for place in run.stack if not _in_a_model(case, place))[:-1]
    return any(score.stack[: len(way)] == way for score in case.trace.scores)


def run_for(case: Case, run: Event, least: Place) -> Place:
    """The call of what runs the model for something. least: at least as far in as this line of the run's way."""
    own = [place for place in run.stack if not _in_a_model(case, place)]
    inside = own[own.index(least) :] if least in own else []
    return inside[-2] if len(inside) > 1 else least


def _in_a_model(case: Case, place: Place) -> bool:
    """Whether a line stands in a class that is a torch module by its own words."""
    return any(
        isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("Module") for base in node.bases)
        and script.line(node.lineno) <= place.line <= script.line(node.end_lineno or node.lineno)
        for script in case.script.all()
        if script.path == place.file
        for node in nodes(script.tree)
    )


def _handed_over(case: Case, run: Event, score: Score) -> Place | None:
    """The innermost call that names what the evaluation's tokens were read into, `collect(model, self.val_tokens)`, by
    the name that the outermost line of their reading gives them."""
    reads = [case.trace.reads[tok.origin] for tok in score.targets if tok.origin >= 0]
    named: dict[Place, set[str]] = {}
    told: dict[Place, set[str]] = {}
    for script in case.script.all():
        for node in nodes(script.tree):
            place = Place(script.path, script.line(getattr(node, "lineno", 0)))
            if isinstance(node, ast.Assign):
                names = {each.id for each in node.targets if isinstance(each, ast.Name)}
                named.setdefault(place, set()).update(names)
            elif isinstance(node, (ast.Name, ast.Attribute)):
                told.setdefault(place, set()).add(last_name(node))
    for depth in range(max((len(read.stack) for read in reads), default=0)):
        names = set[str]().union(*(named.get(read.stack[depth], ()) for read in reads if depth < len(read.stack)))
        if names:
            return next((place for place in reversed(run.stack) if told.get(place, set()) & names), None)
    return None


def _asked_for(case: Case, origin: int) -> Place | None:
    """The innermost line of a read's calls that leads to no other read: above the loader that the training has, too.
    Where the loader was made in the call of what goes through it, that call."""
    reads = case.trace.reads
    read = reads[origin].stack
    for depth in range(len(read) - 1, -1, -1):
        way = read[: depth + 1]
        if all(each.stack[: depth + 1] == way for each in reads if read[depth] in each.stack):
            others = [each.stack[depth] for each in reads[:origin] if each.stack[:depth] == way[:-1] != each.stack]
            own = function_around(case, way[-1])
            made = depth > 1 and any(function_around(case, other) != own for other in others)
            asked = _made_before(case, origin) or (way[-2] if made else way[-1])
            return _maker_of(case, read, asked) or asked
    return None


def _maker_of(case: Case, read: tuple[Place, ...], asked: Place) -> Place | None:
    """Where, in the functions that lead to the line that asks for a read, the loader is made whose own lines read
    then: `calib = Loader(args.val_files)`, which `collect(model, calib)` goes through."""
    at = read.index(asked) if asked in read else len(read)
    first = next((_class_around(case, place) for place in read[at + 1 :] if _class_around(case, place)), 0)
    for place in reversed(read[: at + 1] if first else ()):
        low, high = function_around(case, place)
        made = [
            script.line(call.lineno)
            for script in case.script.all()
            if script.path == place.file
            for call in nodes(script.tree)
            if isinstance(call, ast.Call) and low <= script.line(call.lineno) <= min(high, place.line)
            if _class_named(case, last_name(call.func)) == first
        ]
        if made:
            return Place(place.file, max(made))
    return None


def _class_named(case: Case, name: str) -> int:
    """The first line of a class of the script."""
    named = (each for each in nodes(case.body.tree) if isinstance(each, ast.ClassDef) and each.name == name)
    return next((case.body.line(each.lineno) for each in named), -1)


def _told_validation(case: Case, origin: int) -> Place | None:
    """The innermost of a read's calls that hands over what is named as the validation's: `collect(args.val_files)`."""
    reads = case.trace.reads
    read = reads[origin].stack
    for depth in range(len(read) - 1, -1, -1):
        way, place = read[: depth + 1], read[depth]
        if any(each.stack[: depth + 1] == way and set(each.kinds) != set(reads[origin].kinds) for each in reads):
            return None  # the whole training, which is handed the validation tokens for its log
        for script in case.script.all():
            calls = (node for node in nodes(script.tree) if isinstance(node, ast.Call))
            if script.path == place.file and any(
                script.line(call.lineno) == place.line and any(map(_names_validation, call.args)) for call in calls
            ):
                return place
    return None


def _names_validation(argument: ast.expr) -> bool:
    """val_files, args.val_files, "val", and files("val")."""
    if isinstance(argument, ast.Call):
        return any(isinstance(each, ast.Constant) and _names_validation(each) for each in argument.args)
    said = argument.value if isinstance(argument, ast.Constant) else last_name(argument)
    return isinstance(said, str) and not _VALIDATION.isdisjoint(said.lower().split("_"))


_VALIDATION = frozenset(("val", "valid", "validation"))


def _made_before(case: Case, origin: int) -> Place | None:
    """Where the loader was made that is gone through in the call of another line of the same function: it looked at its
    files when it was. None where its maker read nothing, or data of another kind."""
    reads = case.trace.reads
    read, kinds = reads[origin].stack, set(reads[origin].kinds)
    for other in reversed([each.stack for each in reads[:origin] if kinds == set(each.kinds)]):
        depth = next((n for n, (a, b) in enumerate(zip(read, other, strict=False)) if a != b), 0)
        if depth and function_around(case, read[depth]) == function_around(case, other[depth]):
            inside = [{_class_around(case, place) for place in way[depth + 1 :]} - {0} for way in (read, other)]
            if inside[0] & inside[1]:
                return other[depth]
    return None


def _class_around(case: Case, place: Place) -> int:
    """The first line of the class around a place; 0 outside of any."""
    lines = (
        script.line(node.lineno)
        for script in case.script.all()
        if script.path == place.file
        for node in nodes(script.tree)
        if isinstance(node, ast.ClassDef)
        and script.line(node.lineno) <= place.line <= script.line(node.end_lineno or node.lineno)
    )
    return max(lines, default=0)


def function_around(case: Case, place: Place) -> tuple[int, int]:
    """The first and the last line of the innermost function around a place; (0, 0) outside of any."""
    scripts = (each for each in case.script.all() if each.path == place.file and each.tree is not None)
    lines = (
        (script.line(node.lineno), script.line(node.end_lineno or node.lineno))
        for script in scripts
        for node in nodes(script.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    return max((each for each in lines if each[0] <= place.line <= each[1]), default=(0, 0))


def of_another(case: Case, scores: Sequence[Score], line: int) -> bool:
    """Whether a line stands in a function that scores something itself, for another number than that of these."""
    first, last = function_around(case, case.place(line))

    def inside(each: Score) -> bool:
        return any(place.file == case.body.path and first <= place.line <= last for place in each.stack)

    return bool(first) and not any(map(inside, scores)) and any(map(inside, case.trace.scores))


def called_at(event: Event) -> Place:
    """The line of the main program in which something happens."""
    return event.stack[1] if len(event.stack) > 2 else event.place


def _loop_again(trace: Trace, fault: Fault) -> Place:
    """The loop that goes over the same tokens again."""
    turns = dict((fault.before or fault.cause).nest)
    cut = {loop for tok in fault.score.targets for loop, _, _ in tok.spans}
    for loop, turn in fault.score.nest:
        if turns.get(loop, turn) != turn and loop not in cut:
            return trace.loops.get(loop, fault.score.place)
    return fault.score.place


def _objective(trace: Trace, update: Update) -> Place:
    """Where the loss that a vector follows is made, in the function that optimises it."""
    followed = [trace.scores[bit] for bit in bits(update.losses)]
    depth = len(update.stack)
    for score in reversed(followed):
        if score.whole and score.stack[: depth - 1] == update.stack[:-1] and len(score.stack) >= depth:
            return score.stack[depth - 1]
    return _parted(trace, update) or update.place


def _parted(trace: Trace, update: Update) -> Place | None:
    """Where the loss that a step follows is made, in the last function that both stand in: the step may be taken by a
    helper that is handed the loss."""
    for bit in reversed(list(bits(update.losses))):
        score = trace.scores[bit]
        shared = next((n for n, (a, b) in enumerate(zip(score.stack, update.stack, strict=False)) if a != b), 0)
        if shared:
            return score.stack[shared]
    return None


def _repeated(trace: Trace, fault: Fault) -> Place:
    """The call in the body of the loop that repeats the pass; the loop, where the losses are made in it themselves."""
    turns = dict((fault.before or fault.cause).nest)
    cut = {loop for tok in fault.score.targets for loop, _, _ in tok.spans}
    for loop, turn in fault.score.nest:
        depth = trace.depth.get(loop, 0)
        if turns.get(loop, turn) != turn and 0 < depth <= len(fault.score.stack):
            inside = depth == len(fault.score.stack) and loop not in cut
            return trace.loops.get(loop, fault.score.place) if inside else fault.score.stack[depth - 1]
    return fault.score.place


def parting_of(event: Event, other: Event) -> Place:
    """The call in which two events part: of the first, the line in the last function that both stand in."""
    for mine, theirs in zip(event.stack, other.stack, strict=False):
        if mine != theirs:
            return mine
    return event.place
