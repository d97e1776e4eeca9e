"""Training data is read for calibration after the training time is used up."""

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.flow.events import Choice, Forward, Update
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import unseen
from fairway.audit.passes.late import late_calibration, over_long, taught_at_evaluation
from fairway.audit.passes.places import called_at, parting_of, run_for
from fairway.audit.passes.reserves import unreserved
from fairway.audit.verdict import Finding, Place

ID = "calibration-after-cap"
CHARGE = "calibration reads training data after the 600 s of training"
CLAUSE = 'RULES.md R2, R4; (c) "GPTQ after the cap"'


def check(case: Case) -> Finding:
    which, _, _ = passes_of(case)
    late = late_calibration(case.trace, which)
    if late is not None and late.clock is not None and over_long(late.clock.limit or 0.0):
        return Finding(ID, "clean", "the training's own clock is too long, which is a charge of its own", CLAUSE)
    if late is not None and late.clock is not None:
        evidence = (
            f"Training stops at {late.clock.place} when the whole {late.clock.limit:g} are used; the weights that "
            f"score are then {_made(late.update)} training data."
        )
        kept_back = unreserved(case)
        if kept_back is not None:
            evidence += f" The setting at {kept_back} keeps nothing back for it."
        return Finding(ID, "violates", evidence, CLAUSE, _place(case, late.update))
    if late is not None:
        evidence = (
            f"The weights are calibrated on training data at {late.update.place} after the training loop, and no limit "
            "of its time could be read that would leave room for it."
        )
        return Finding(ID, "suspect", evidence, CLAUSE, _place(case, late.update))
    if not which.score:
        return unseen(case, ID, CLAUSE)
    taught = taught_at_evaluation(case.trace, which)
    if taught is not None:
        evidence = (
            f"What scores learns from training text at {taught.place} after the model's file was written: training "
            "data is read during the evaluation."
        )
        return Finding(ID, "violates", evidence, CLAUSE, called_at(taught))
    own = late_calibration(case.trace, which, ("generated", "random"))
    if own is not None and own.clock is not None:
        evidence = (
            f"Training stops at {own.clock.place} when the whole {own.clock.limit:g} are used; the weights that score "
            f"are then {_made(own.update)} text that the model wrote itself."
        )
        return departure(case, "self-generated-calibration", CLAUSE, evidence, own.update.place)
    return Finding(ID, "clean", "No training data is read for calibration after the training time.", CLAUSE)


def _made(late: Update | Choice) -> str:
    if isinstance(late, Choice):
        return f"settled at {late.place} by their losses on"
    return f"computed at {late.place} from activations on"


def _place(case: Case, update: Update | Choice) -> Place:
    """The call of what runs the model on training data for the calibration: at least as far in as where its way parts
    from that to the last step of training."""
    trained = [each for each in case.trace.updates if each.how == "gradient" and each.number < update.number]
    begun = max((each.number for each in trained), default=0)
    runs = (
        event
        for event in case.trace.events[begun : update.number]
        if isinstance(event, Forward) and any(tok.data == "train" for tok in event.toks)
    )
    run = next(runs, update)
    return run_for(case, run, parting_of(run, trained[-1]) if trained else called_at(run))
