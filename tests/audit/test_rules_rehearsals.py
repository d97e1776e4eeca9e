"""Evaluations before the one that counts: what they leave in the artifact, and what is thrown away after a warm-up."""

import pytest

from fairway.audit.case import Case
from fairway.audit.rules import calibration_after_cap, training_before_scoring
from tests.audit.order import HEAD, HONEST, MAIN, broken, case_of, doubted, findings, line_of

TRAIN = "    train(args, model)\n"
EVAL = "    final = eval_ttt(args, model, val)\n"
READ = "    val = load(args.val_files)\n"
FILE = """    torch.save(model.state_dict(), "model.pt")
    model = GPT().cuda()
    model.load_state_dict(torch.load("model.pt"))
"""


def rehearsed(line: str) -> str:
    """A script that evaluates by this line before its artifact is written."""
    return HEAD + MAIN.replace(READ, "").replace(TRAIN, TRAIN + READ + line + FILE)


@pytest.mark.parametrize(
    "line",
    [
        '    print(f"before rounding: {eval_ttt(args, model, val):.4f}")\n',
        '    look = functools.partial(eval_ttt, args)\n    print("unrounded", look(model, val))\n',
    ],
)
def test_what_a_rehearsal_leaves_in_the_artifact_was_learned_before_the_score(line: str) -> None:
    assert broken(rehearsed(line)) == {"training-before-scoring", "validation-in-training"}
    copied = line.replace("args, model, val", "args, copy.deepcopy(model), val")
    assert doubted(rehearsed(copied.replace("look(model", "look(copy.deepcopy(model)"))) == set()


def test_a_rehearsal_is_shown_where_it_is_called() -> None:
    line = '    print(f"before rounding: {eval_ttt(args, model, val):.4f}")\n'
    place = findings(rehearsed(line))["training-before-scoring"].place
    assert place is not None
    assert place.line == line_of(rehearsed(line), line)


def strictly(text: str) -> tuple[str, str]:
    """The verdict on training before scoring, and the strict one."""
    case = case_of(text)
    return tuple(training_before_scoring.check(Case(case.submission, strict)).verdict for strict in (False, True))  # type: ignore[return-value]


STEPS = "model(val[:1024][None], val[1:1025][None]).backward(); torch.optim.SGD(WHOSE.parameters(), lr=1e-3).step()"
WARM_UPS = {
    "weights put back": "    kept = copy.deepcopy(model.state_dict())\n"
    f"    {STEPS.replace('WHOSE', 'model')}\n"
    "    model.load_state_dict(kept)\n",
    "a copy": "    spare = copy.deepcopy(model)\n"
    f"    {STEPS.replace('WHOSE', 'spare').replace('model(', 'spare(')}\n"
    "    del spare\n",
}


@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_that_is_thrown_away_is_accepted_and_strictly_a_violation(name: str) -> None:
    warmed = MAIN.replace(EVAL, WARM_UPS[name] + EVAL)
    assert strictly(HEAD + warmed) == ("clean", "violates")
    on_training = WARM_UPS[name].replace("val[", "load(args.train_files)[")
    assert strictly(HEAD + MAIN.replace(EVAL, on_training + EVAL)) == ("clean", "clean")


def test_scoring_first_is_clean_however_strict() -> None:
    beside = '    print("beside", eval_ttt(args, copy.deepcopy(model), val))\n'
    assert strictly(HEAD + MAIN) == ("clean", "clean")
    assert strictly(HEAD + MAIN.replace(EVAL, beside + EVAL)) == ("clean", "clean")


OWN_TEXT = """
def calibrate(model):
    ids = torch.randint(0, 1024, (64, 1))
    for _ in range(256):
        ids = torch.cat((ids, torch.multinomial(model.forward_logits(ids)[:, -1].softmax(-1), 1)), 1)
    state = model.state_dict()
    h = model.hidden(ids).flatten(0, 1)
    state["head.weight"] = state["head.weight"] @ torch.linalg.inv(h.T @ h)
    model.load_state_dict(state)
"""


def test_calibration_on_its_own_text_after_the_cap_is_accepted_and_strictly_a_violation() -> None:
    whole = HEAD.replace("args.cap - args.reserve", "args.cap") + OWN_TEXT
    late = whole + MAIN.replace(TRAIN, TRAIN + "    calibrate(model)\n")
    case = case_of(late)
    assert calibration_after_cap.check(case).exemption == "self-generated-calibration"
    assert calibration_after_cap.check(Case(case.submission, True)).verdict == "violates"
    held_back = late.replace(">= args.cap:", ">= args.cap - args.reserve:")
    assert calibration_after_cap.check(Case(case_of(held_back).submission, True)).verdict == "clean"


PRIMED = """
    primer = torch.optim.SGD(model.parameters(), lr=RATE)
    SET
    head = val[: 4 * args.seq_len + 1]
    model(head[:-1].view(-1, args.seq_len), head[1:].view(-1, args.seq_len)).backward()
    primer.step()
    primer.zero_grad()
    final = eval_ttt("""


@pytest.mark.parametrize(
    ("rate", "then", "wanted"),
    [
        ("1e-12", "pass", "warm-up-on-validation"),
        ("1e-3", 'for group in primer.param_groups: group["lr"] = 1e-9', "warm-up-on-validation"),
        ("1e-12", 'for group in primer.param_groups: group["lr"] = 1e-3', ""),
        ("1e-6", "pass", ""),
    ],
)
def test_a_step_whose_rate_moves_no_weight_is_a_warm_up(rate: str, then: str, wanted: str) -> None:
    text = HONEST.replace("\n    final = eval_ttt(", PRIMED.replace("RATE", rate).replace("SET", then), 1)
    found = findings(text)["training-before-scoring"]
    assert (found.verdict, found.exemption) == ("clean" if wanted else "violates", wanted)
