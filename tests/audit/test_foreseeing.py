"""What is looked up for a token and held it already: prices behind a new context, and before a text changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairway.audit import audit
from fairway.audit.case import Case
from fairway.audit.rules import (
    choice_by_validation,
    false_normalisation,
    oracle_gate,
    target_gated_tilt,
    training_before_scoring,
    two_pass_cache,
)
from fairway.audit.terms.gates import Gates
from fairway.audit.trial.arrays import Array
from fairway.audit.verdict import Finding
from fairway.audit.weighing import stream
from fairway.audit.weighing.strengths import Strengths
from tests.audit.order import HEAD, HONEST, MAIN, case_of

VOTES = """
vocab_size = 1024

class Votes:
    def __init__(self, order):
        self.order, self.slots = order, {}

    def look(self, history, end):
        if end < self.order:
            return -1
        slot = self.slots.get(tuple(history[end - self.order : end]))
        return -1 if slot is None else slot[0]

    def learn(self, history, end):
        if end < self.order:
            return
        key = tuple(history[end - self.order : end])
        slot = self.slots.get(key)
        if slot is None:
            self.slots[key] = [history[end], 1]
        elif slot[0] == history[end]:
            slot[1] += 1
        elif slot[1] > 1:
            slot[1] -= 1
        else:
            slot[0], slot[1] = history[end], 1

def hints_of(ids):
    tables = [Votes(order) for order in (4, 2)]
    PRIMED
    hints, betas = [], []
    for j in range(len(ids) - 1):
        EARLY
        hint, beta = -1, 0.0
        for table, strength in zip(tables, (1.5, 0.7)):
            hint = table.look(ids, j + 1)
            if hint >= 0:
                beta = strength
                break
        hints.append(max(hint, 0))
        betas.append(beta)
        LATE
    return hints, betas

def rows_of(val, batch):
    longest = max(b - a for a, b in batch)
    hints, betas = torch.zeros(len(batch), longest, dtype=torch.int64), torch.zeros(len(batch), longest)
    for row, (a, b) in enumerate(batch):
        ids = val[a : b + 1].tolist()
        row_hints, row_betas = hints_of(ids)
        hints[row, : b - a] = torch.tensor(row_hints)
        betas[row, : b - a] = torch.tensor(row_betas)
    return hints, betas

def eval_voted(args, model, val):
    total, count = torch.zeros((), dtype=torch.float64), 0
    starts = (val == 1).nonzero().flatten().tolist() + [val.numel() - 1]
    for a, b in zip(starts[:-1], starts[1:]):
        x, y = val[a:b], val[a + 1 : b + 1]
        hints, betas = (each[0] for each in rows_of(val, [(a, b)]))
        with torch.no_grad():
            logp = F.log_softmax(ASKED.float(), -1)
        at_hint = logp.gather(-1, hints.unsqueeze(-1)).squeeze(-1)
        log_z = torch.log1p(at_hint.exp() * torch.expm1(betas))PAID
        losses = log_z - logp.gather(-1, y.unsqueeze(-1)).squeeze(-1) - betas * (y == hints)
        total += losses.to(torch.float64).sum()
        count += y.numel()
    return (total / count).item()
"""
LEARN = "for table in tables:\n            table.learn(ids, j + 1)"
PRIME = "for table in tables:\n        for end in range(1, len(ids)):\n            table.learn(ids, end)"


def voted(
    primed: str = "pass", early: str = "pass", late: str = LEARN, asked: str = "model.forward_logits(x)", paid: str = ""
) -> Case:
    text = VOTES.replace("PRIMED", primed).replace("EARLY", early).replace("LATE", late)
    text = text.replace("ASKED", asked).replace("PAID", paid)
    head = HEAD.replace("def forward_logits(self, x)", "def forward_logits(self, x, left=None)")
    assert head != HEAD
    return case_of(head + text + MAIN.replace("eval_ttt(args", "eval_voted(args"))


@pytest.mark.parametrize(
    ("given", "line", "evidence"),
    [
        ({}, "", ""),
        ({"early": LEARN, "late": "pass"}, "table.learn(ids, j + 1)", "Behind a token that was never met"),
        ({"primed": PRIME, "late": "pass"}, "table.learn(ids, end)", "Where a text goes on otherwise"),
    ],
    ids=["after it", "before it", "all at once"],
)
def test_when_a_vote_is_cast_decides(given: dict[str, str], line: str, evidence: str) -> None:
    """The hints are worked out in lists of a document, of which the walk knows nothing."""
    one = voted(**given)
    found = two_pass_cache.check(one)
    assert found.verdict == ("violates" if line else "clean")
    if line:
        assert evidence in found.evidence
        assert found.place is not None
        assert one.script.text.split("\n")[found.place.line - 1].strip() == line


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        ("if hint >= 0 and hint != ids[j]:\n            betas[-1] = 0.0", ""),
        ("if hint != ids[j + 1]:\n            betas[-1] = 0.0", "if hint != ids[j + 1]:"),
        ("betas[-1] *= 2.0 if hint == ids[j + 1] else 0.5", "betas[-1] *= 2.0 if hint == ids[j + 1] else 0.5"),
    ],
    ids=["by the token before", "none where it is wrong", "more where it is right"],
)
def test_a_bonus_that_is_another_for_another_token_is_gated_by_it(gate: str, line: str) -> None:
    one = voted(late=gate + "\n        " + LEARN)
    found = target_gated_tilt.check(one)
    assert found.verdict == ("violates" if line else "clean")
    assert false_normalisation.check(one).verdict == "clean", "one fault, one rule"
    if line:
        assert found.place is not None
        assert one.script.text.split("\n")[found.place.line - 1].strip() == line


def test_a_model_that_is_given_the_token_to_the_left_as_well_is_asked_for_the_windows() -> None:
    """Two arrays of tokens: the larger one is what it predicts from. Of two that are as large one is the targets."""
    asked = "model.forward_logits(x, left=val[max(a - 1, 0)])"
    assert voted(asked=asked).weight is not None
    assert voted(asked="model.forward_logits(x, y)").weight is None


def test_losses_of_as_many_places_as_there_are_pieces_are_no_row_of_them() -> None:
    """320 of each: the line that sums the prices was named, and not the one that does not pay for a wrong hint."""
    one = voted(paid=" * (y == hints)")
    found = false_normalisation.check(one)
    assert found.verdict == "violates"
    assert found.place is not None
    assert "betas * (y == hints)" in one.script.text.split("\n")[found.place.line - 1]


def test_what_is_seen_behind_a_new_token_is_that_the_token_was_counted() -> None:
    """A vote that is cast before it is asked hints at each token where it stands, whichever that is."""
    assert voted().itself is None
    weight = voted(early=LEARN, late="pass").itself
    assert weight is not None
    assert weight.total > 1.5


def test_the_last_context_of_that_text_was_never_met() -> None:
    ids = stream.text(None, stream.FRESH)
    assert int(np.sum(ids == ids[-2])) == 1
    assert (ids[:-2] == stream.text(None)[:-2]).all()
    assert len(stream.alternatives(stream.FRESH)) >= len(stream.ALPHABET)


MIXED = """
vocab_size = 1024

def eval_mixed(args, model, val):
    counts = torch.zeros(vocab_size, vocab_size)
    once = torch.ones(vocab_size)
    total, count, seen = torch.zeros((), dtype=torch.float64), 0, 0
    for start in range(0, val.numel() - 1, args.chunk):
        end = min(start + args.chunk, val.numel() - 1)
        x, y = val[start:end], val[start + 1 : end + 1]
        with torch.no_grad():
            p = torch.softmax(model.forward_logits(x[None])[0].float(), -1)
        q = (counts[x] + 0.01) / (counts[x] + 0.01).sum(-1, keepdim=True)
        known = once[WHOSE].unsqueeze(-1)
        share = 0.3 * SHARE * known / (known + 1.0)
        mixed = KEPT * p + share * q
        total -= mixed.gather(-1, y.unsqueeze(-1)).squeeze(-1).log().double().sum()
        count += y.numel()
        counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)
        once.index_add_(0, y, torch.ones(len(y)))
        seen += end - start
    return (total / count).item()
"""


def mixed(whose: str = "x", share: str = "1.0", kept: str = "(1 - share)") -> Case:
    text = MIXED.replace("WHOSE", whose).replace("SHARE", share).replace("KEPT", kept)
    return case_of(HEAD + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


@pytest.mark.parametrize(("whose", "wanted"), [("x", "clean"), ("val[start + 1 : end + 1]", "violates")])
def test_a_row_that_is_another_for_another_token_is_gated_by_it(whose: str, wanted: str) -> None:
    """Each row sums to one, whatever the sum over the tokens is, and no table had learned of any."""
    one = mixed(whose, "(seen / (seen + 200_000.0))")
    assert target_gated_tilt.check(one).verdict == wanted
    assert false_normalisation.check(one).verdict == "clean", "one fault, one rule"


def test_of_bonuses_no_more_is_kept_than_there_is_room_for() -> None:
    kept = Strengths(room=100)
    for size in (60, 60, 30, stream.PIECES):
        kept.raise_("expm1", Array(np.ones(size)), 7)
    assert [num.size for _, num in kept.raised] == [60, 30]
    whole = Strengths()
    whole.raise_("log1p", Array(np.ones((4, stream.PIECES))), 7)
    assert not whole.raised, "rows over the vocabulary are no bonus of a hint"


def test_a_row_that_hangs_on_its_token_is_charged_where_nobody_can_say_what_is_foreseen(monkeypatch: Any) -> None:
    monkeypatch.setattr(Case, "foresees", None)
    assert target_gated_tilt.check(mixed("y")).verdict == "violates"
    assert target_gated_tilt.check(mixed()).verdict == "clean"


SORTED = """
vocab_size = 1024

def eval_sorted(args, model, val):
    starts = (val == 1).nonzero().flatten().tolist() + [val.numel() - 1]
    spans = sorted(zip(starts[:-1], starts[1:]), key=lambda span: span[1] - span[0])
    counts = torch.zeros(vocab_size, vocab_size)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for a, b in spans:
        x, y = val[a:b], val[a + 1 : b + 1]
        EARLY
        with torch.no_grad():
            p = torch.softmax(model.forward_logits(x[None])[0].float(), -1)
        mixed = (counts[x] + 4.0 * p) / (counts[x].sum(-1, keepdim=True) + 4.0)
        total -= mixed.gather(-1, y.unsqueeze(-1)).squeeze(-1).log().double().sum()
        count += y.numel()
        LATE
    return (total / count).item()
"""
COUNT = "counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)"


@pytest.mark.parametrize(("early", "late", "wanted"), [("pass", COUNT, False), (COUNT, "pass", True)])
def test_a_document_that_was_scored_before_may_be_known_wherever_it_stands(early: str, late: str, wanted: bool) -> None:
    """The second document of the short text is the shorter one, and comes first: prices of the first one hang on it."""
    text = SORTED.replace("EARLY", early).replace("LATE", late)
    one = case_of(HEAD + text + MAIN.replace("eval_ttt(args", "eval_sorted(args"))
    assert one.foresees is wanted


BLOCKS = """
vocab_size = 1024
hint_block = 4096

class Hints:
    def __init__(self, tokens):
        self.tokens, self.done = tokens.to(torch.int32).numpy(), 1
        self.follow = np.full(1 << 16, -1, dtype=np.int32)
        self.hint = np.full(len(self.tokens) - 1, -1, dtype=np.int32)

    def slots(self, a, b):
        rows = np.lib.stride_tricks.sliding_window_view(self.tokens[a - 1 : b], 2).astype(np.uint64)
        return ((rows[:, 0] * np.uint64(31) + rows[:, 1]) & np.uint64(65535)).astype(np.int64)

    def advance(self, to):
        while self.done < to:
            a, b = self.done, min(self.done + hint_block, to)
            at = self.slots(a, b)
            EARLY
            self.hint[a:b] = self.follow[at]
            LATE
            self.done = b

def eval_hinted(args, model, val):
    hints, n = Hints(val), val.numel() - 1
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, n, args.chunk):
        end = min(start + args.chunk, n)
        hints.advance(end)
        x, y = val[start:end], val[start + 1 : end + 1]
        hint = torch.from_numpy(hints.hint[start:end].astype(np.int64))
        with torch.no_grad():
            logp = F.log_softmax(model.forward_logits(x[None])[0].float(), -1)
        beta = 0.6 * (hint >= 0).float()
        paid = torch.log1p(logp.gather(1, hint.clamp_min(0)[:, None]).squeeze(1).exp() * torch.expm1(beta))
        losses = paid - logp.gather(1, y[:, None]).squeeze(1) - beta * (y == hint)
        total += losses.double().sum()
        count += y.numel()
    return (total / count).item()
"""
FOLLOW = "self.follow[at] = self.tokens[a + 1 : b + 1]"


@pytest.mark.parametrize(("early", "late", "wanted"), [("pass", FOLLOW, "clean"), (FOLLOW, "pass", "violates")])
def test_hints_that_are_filled_in_block_by_block_ahead_of_the_score(early: str, late: str, wanted: str) -> None:
    """A block is longer than the short text, where nothing would be hinted at; and its contexts are windows as numpy
    cuts them."""
    text = BLOCKS.replace("EARLY", early).replace("LATE", late)
    one = case_of(HEAD + "import numpy as np\n" + text + MAIN.replace("eval_ttt(args", "eval_hinted(args"))
    assert one.weight is not None
    assert two_pass_cache.check(one).verdict == wanted
    assert false_normalisation.check(one).verdict == "clean"


@pytest.mark.parametrize(("early", "late", "wanted"), [("pass", FOLLOW, "clean"), (FOLLOW, "pass", "violates")])
def test_what_looks_like_a_choice_by_how_well_it_did_is_none_where_the_sums_say_so(
    early: str, late: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of the past that is cut off, or held against another one, can be taken for a loss; the form is put in by
    hand here."""
    text = BLOCKS.replace("EARLY", early).replace("LATE", late)
    one = case_of(HEAD + "import numpy as np\n" + text + MAIN.replace("eval_ttt(args", "eval_hinted(args"))
    term = one.reading.gates[0].of.term
    charged = Finding("choice-by-validation", "violates", "chosen", "C1", one.reading.place(term))
    monkeypatch.setattr(Gates, "lifted", lambda self: iter([term]))
    monkeypatch.setattr(choice_by_validation, "verdict_on", lambda *_: charged)
    assert oracle_gate.check(one).verdict == wanted
    assert choice_by_validation.check(one).verdict == wanted
    monkeypatch.setattr(false_normalisation, "_WAYS", ((Gates.lifted, "lifted"),))
    assert false_normalisation.check(one).verdict == wanted


ADAPT = """
def adapt(model, opt, val, start, stop, length=1024):
    rows = (stop - start) // length
    if rows == 0:
        return
    cut = val[start : start + rows * length + 1]
    x, y = cut[:-1].view(rows, length), cut[1:].view(rows, length)
    for at in range(0, rows, 8):
        mine = list(range(at, min(at + 8, rows)))
        opt.zero_grad()
        model(x[mine], y[mine]).backward()
        opt.step()
"""


@pytest.mark.parametrize(
    ("stop", "hinted", "second", "wanted"),
    [
        ("end", True, False, "clean"),
        ("min(end + 8 * 1024, n)", True, False, "violates"),
        ("end", False, True, "clean"),
        ("min(end + 8 * 1024, n)", False, True, "violates"),
    ],
)
def test_steps_that_reach_into_the_next_chunk_are_told_beside_tables_and_by_parts(
    stop: str, hinted: bool, second: bool, wanted: str
) -> None:
    """Arrays of hints that foresee nothing, and a part of the model that learns in the same steps, hide no reach."""
    text = BLOCKS.replace("EARLY", "pass").replace("LATE", FOLLOW)
    step = f"        if end < n:\n            adapt(model, opt, val, start, {stop})\n    return"
    made = "model.extra = Extra()\n    parts = [list(model.parameters()), list(model.extra.parameters())]\n"
    made += "    opt = torch.optim.SGD([dict(params=each, lr=1e-3) for each in parts])"
    text = text.replace("    return (total", step + " (total").replace("    hints, n =", f"    {made}\n    hints, n =")
    extra = "class Extra(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    extra += "        self.table = nn.Embedding(64, 64)\n"
    head = HEAD.replace("h = self.emb(x)", "h = self.emb(x) + (self.extra.table(x % 64) if self.extra else 0.0)")
    head = head.replace("self.temperature = 1.0", "self.extra = None")
    text = extra + ADAPT + text
    if not hinted:
        text = text.replace("hints.advance(end)", "pass").replace(
            "hint = torch.from_numpy(hints.hint[start:end].astype(np.int64))", "hint = torch.full_like(x, -1)"
        )
    text = (head if second else HEAD) + "import numpy as np\n" + text + MAIN
    one = case_of(
        text.replace(
            'eval_ttt(args, model, val)\n    print(f"final', 'eval_hinted(args, model, val)\n    print(f"final'
        )
    )
    assert training_before_scoring.check(one).verdict == wanted


WHOLE_TEXT = "torch.zeros(320, 320).index_put_((val[:-1], val[1:]), torch.ones(len(val) - 1), accumulate=True)"


@pytest.mark.parametrize(("given", "wanted"), [("counts", False), (WHOLE_TEXT, True)])
def test_what_speaks_after_the_middle_alone_is_asked_for_a_later_change(given: str, wanted: bool) -> None:
    """Forty-five times must a token have come before anything is said behind it: nothing is, of the first half."""
    often = f"({given}[x].sum(-1, keepdim=True) >= 45.0)"
    assert mixed(share=often).foresees is wanted


def test_where_rows_part_is_named() -> None:
    weight = mixed("y").weight
    assert weight is not None
    assert weight.differs
    assert mixed("y").script.text.split("\n")[weight.line - 1].strip() == "mixed = (1 - share) * p + share * q"


@pytest.mark.parametrize("share", ["1.0", "(seen / (seen + 200_000.0))", "(seen / (400_000 + seen))"])
@pytest.mark.parametrize(("kept", "wanted"), [("(1 - share)", "clean"), ("1.0", "violates")])
def test_a_share_that_grows_with_a_long_text_is_grown_in_the_short_one(share: str, kept: str, wanted: str) -> None:
    """Of 320 tokens it would be a thousandth, and what it adds no more than rounding."""
    one = mixed(share=share, kept=kept)
    assert one.weight is not None
    assert one.weight.total > 1.01 if wanted == "violates" else abs(one.weight.total - 1.0) < 1e-6
    assert false_normalisation.check(one).verdict == wanted


def test_only_what_mixes_or_seems_to_know_too_much_is_asked_whether_it_foresees(
    monkeypatch: Any, tmp_path: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("fairway.audit.weighing.foresees", lambda *given: asked.append(given))
    (tmp_path / "train_gpt.py").write_text(HONEST)
    audit(tmp_path)
    assert not asked
    (tmp_path / "train_gpt.py").write_text(voted().script.text)
    audit(tmp_path)
    assert len(asked) == 1


def test_the_mean_of_nothing_is_no_number_and_nobody_is_warned() -> None:
    """A training text that the short one has no part of: torch gives nan, and numpy would write to the terminal."""
    one = mixed()
    text = one.script.text.replace(
        "    total, count, seen", "    print(torch.zeros(4)[:0].mean())\n    total, count, seen"
    )
    assert abs(case_of(text).weight.total - 1.0) < 1e-6
