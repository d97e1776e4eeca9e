"""A value is followed to the printed score, whichever way Python carries it there."""

import importlib
from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.submission import opened
from fairway.audit.terms.term import Below, Term
from tests.audit.small import COUNT, HEAD, TABLE, script, verdict
from tests.audit.ways import HELPERS, WAYS

RULES = ("oracle_gate", "target_gated_tilt", "byte_double_space", "byte_missing_mark", "byte_constant")
BETTER = "nll = torch.minimum(nll, F.cross_entropy(logits * 1.1, torch.from_numpy(y), reduction='none'))"


def verdicts(folder: Path, way: str, fault: str = "pass", count: str = COUNT) -> dict[str, str]:
    helpers = HELPERS.replace("{fault}", fault).replace("{count}", count)
    (folder / "train_gpt.py").write_text(HEAD + TABLE + helpers + WAYS[way], encoding="utf-8")
    case = Case(opened(folder))
    return {rule: importlib.import_module(f"fairway.audit.rules.{rule}").check(case).verdict for rule in RULES}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_honest_is_clean_and_what_is_not_is_found(tmp_path: Path, way: str) -> None:
    clean = dict.fromkeys(RULES, "clean")
    assert verdicts(tmp_path, way) == clean
    assert verdicts(tmp_path, way, fault=BETTER) == {**clean, "oracle_gate": "violates"}
    spaces = verdicts(tmp_path, way, count=COUNT + " + lead[y].sum()")
    assert spaces == {**clean, "byte_double_space": "violates"}


FUSED = """
class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, cap):
        loss, lse = torch.empty(logits.size(0)), torch.empty(logits.size(0))
        for a in range(0, logits.size(0), 128):
            z = cap * torch.tanh(logits[a : a + 128] / cap)
            lse[a : a + 128] = torch.logsumexp(z, dim=-1)
            loss[a : a + 128] = lse[a : a + 128] - z.gather(1, target[a : a + 128, None]).squeeze(1)
        ctx.save_for_backward(logits, target, lse)
        return RETURNED
"""


@pytest.mark.parametrize(("returned", "wanted"), [("loss", "clean"), ("loss.clamp(max=9.0)", "violates")])
def test_a_function_with_a_gradient_of_its_own_is_its_forward(returned: str, wanted: str, tmp_path: Path) -> None:
    loss = "\n        nll = Fused.apply(net(torch.from_numpy(x)).float(), torch.from_numpy(y), 30.0)\n"
    text = script(extra=FUSED.replace("RETURNED", returned), loss=loss)
    assert verdict(tmp_path, "oracle_gate", text).verdict == wanted


@pytest.mark.parametrize(("by", "wanted"), [("x", "clean"), ("y", "violates")])
def test_logits_are_sharpened_by_the_context_before_a_loss_that_takes_them_in_blocks(
    by: str, wanted: str, tmp_path: Path
) -> None:
    loss = f"""
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        sharp = torch.where(torch.from_numpy(lead)[torch.from_numpy({by})], 1.0, 1.05)
        nll = Fused.apply(net(a).float() * sharp[..., None], b.reshape(-1), 30.0)
"""
    text = script(extra=FUSED.replace("RETURNED", "loss"), loss=loss)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


def test_a_wrapper_that_takes_a_functions_name_does_not_call_it_with_itself(tmp_path: Path) -> None:
    helpers = HELPERS.replace("{fault}", "pass").replace("{count}", COUNT)
    (tmp_path / "train_gpt.py").write_text(HEAD + TABLE + helpers + WAYS["own-decorator"], encoding="utf-8")
    reading = Case(opened(tmp_path)).reading
    called = [event for event in reading.entry.called("cross_entropy") if event.path[-1:] == ("price",)]
    assert called
    assert all(event.path[:2] == ("inner", "evaluate") for event in called)


def test_a_name_of_values_that_are_chosen_from_each_other_is_asked_of_each_once(tmp_path: Path) -> None:
    """Forty choices from two objects: 2^40 ways lead through them, and 80 values."""
    chosen = "    x, y = (x if random.random() < 0.5 else y), (y if random.random() < 0.5 else x)\n" * 40
    made = "import random\nclass Held:\n    def __init__(self, v):\n        self.v = v\n"
    state = "x, y = Held(1.0), Held(2.0)\n" + chosen + "    print(x.v + y.v)"
    assert verdict(tmp_path, "target_gated_tilt", script(extra=made, state=state)).verdict == "clean"


def test_what_stands_below_many_terms_is_asked_of_each_term_once() -> None:
    asked: list[Term] = []

    def is_seven(term: Term) -> bool:
        asked.append(term)
        return term.constant() == 7

    chain = [Term("const", value=7)]
    for step in range(2_000):
        chain.append(Term("call", (chain[-1], Term("const", value=step + 8)), "add"))
    below = Below(is_seven)
    assert all(map(below, chain))
    assert len(asked) == len({id(term) for term in asked}) <= 2 * len(chain)
    behind = Term("store", (Term("const", value=1), chain[0]))
    assert not Below(is_seven, into=lambda term: term.op != "store")(behind)
    assert not Below(is_seven, parts=lambda term: term.parts[:1])(behind)
    assert below(behind)
