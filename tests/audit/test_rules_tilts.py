"""Which tokens a loss scores, where entropies and hints are read beside it; and what pays for a right hint."""

from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.submission import opened
from fairway.audit.terms.mixtures import underpaid_bonus, unpaid_bonus
from tests.audit.small import TABLE, line_of, script, verdict, verdicts

RULES = ("oracle_gate", "gold_token_ngram", "false_normalisation", "target_gated_tilt")
ROWS = """
        rows = torch.from_numpy(piece)[None]
        hs = torch.tensor([[memory.get(token, -1) for token in x.tolist()]])
        z = net(rows[:, :-1].contiguous())
        lp = torch.log_softmax(z, -1)
        nll = -lp.gather(2, rows[:, 1:, None])[..., 0]
        {then}
        for past, token in zip(x.tolist(), y.tolist()):
            memory[past] = token
"""
UNSURE = """flat = -(lp.exp() * lp).sum(-1) > 1.5
        leant = z.scatter_add(2, hs.clamp_min(0)[..., None], 2.0 * (hs >= 0).float()[..., None])
        leant = -torch.log_softmax(leant, -1).gather(2, rows[:, 1:, None])[..., 0]
        nll = torch.where(flat, leant, nll)"""
PAID = """ph = lp.gather(2, hs.clamp_min(0)[..., None])[..., 0].exp()
        nll += torch.where(hs >= 0, torch.log1p(ph * math.expm1(2.0)), 0.0)
        nll -= 2.0 * ((hs >= 0) & (hs == rows[:, 1:]))"""
BY_SUM = """raised = z.scatter_add(2, hs.clamp_min(0)[..., None], 2.0 * (hs >= 0).float()[..., None])
        nll = torch.logsumexp(raised, -1) - z.gather(2, rows[:, 1:, None])[..., 0]
        nll -= 2.0 * ((hs >= 0) & (hs == rows[:, 1:]))"""
UNPAID = "nll -= 2.0 * (hs == rows[:, 1:])"
MASKED = """on = ((hs >= 0) & torch.from_numpy(lead)[rows[:, 1:]]).float()
        z = z.scatter_add(2, hs.clamp_min(0)[..., None], 2.0 * on[..., None])
        nll = -torch.log_softmax(z, -1).gather(2, rows[:, 1:, None])[..., 0]"""

SWITCHED = """ph = lp.gather(2, hs.clamp_min(0)[..., None])[..., 0].exp()
        gain = 2.0 * (hs == rows[:, 1:]).float() - torch.log1p(ph * math.expm1(2.0))
        nll = nll - torch.where(ON, gain, torch.zeros_like(gain))"""
BY_CONTEXT = SWITCHED.replace("ON", "(hs >= 0) & torch.from_numpy(lead)[rows[:, :-1]]")
BY_TARGET = SWITCHED.replace("ON", "(hs >= 0) & torch.from_numpy(lead)[rows[:, 1:]]")


def text(then: str) -> str:
    return script(loss=ROWS.format(then=then), state="memory = {}")


@pytest.mark.parametrize(
    "then", ["pass", UNSURE, PAID, BY_SUM, BY_CONTEXT], ids=["plain", "unsure", "paid", "by-its-sum", "switched"]
)
@pytest.mark.parametrize("rule", RULES)
def test_a_tilt_that_reads_the_context_alone_is_clean(tmp_path: Path, then: str, rule: str) -> None:
    assert verdict(tmp_path, rule, text(then)).verdict == "clean"


def test_a_tilt_that_is_switched_by_the_target_is_gated(tmp_path: Path) -> None:
    assert verdict(tmp_path, "target_gated_tilt", text(BY_TARGET)).verdict == "violates"


def test_a_bonus_for_a_right_hint_must_be_paid(tmp_path: Path) -> None:
    assert verdict(tmp_path, "false_normalisation", text(UNPAID)).verdict == "violates"


@pytest.mark.parametrize(
    "less",
    ["ph.clamp(max=0.35)", "ph.clamp_max(0.5)", "torch.clamp(ph, 0.0, 0.9)", "0.8 * ph", "ph.mean().expand_as(ph)"],
)
def test_what_a_bonus_takes_is_paid_whole(tmp_path: Path, less: str) -> None:
    """Where the model is sure of a hint, less is taken off than it gains."""
    code = text(PAID.replace("ph * math", f"{less} * math"))
    (tmp_path / "train_gpt.py").write_text(code)
    assert [term for gates in Case(opened(tmp_path)).reading.gates for term in underpaid_bonus(gates)]
    whole = text(PAID.replace("ph * math", "ph.clamp(max=1.0) * math"))
    (tmp_path / "train_gpt.py").write_text(whole)
    assert not [term for gates in Case(opened(tmp_path)).reading.gates for term in underpaid_bonus(gates)]


STRENGTHS = """gain = torch.zeros(hs.shape)
        gain[hs >= 0] = 2.0
        price = torch.log1p(SHARE * torch.expm1(gain))
        nll = nll + price - gain * (hs == rows[:, 1:]).float()"""


JOINED = """ph = lp.gather(2, hs.clamp_min(0)[..., None])[..., 0].exp()
        blocks = [torch.from_numpy(size[part.numpy()] / (1.0 + size[part.numpy()])) for part in hs.clamp_min(0)]
        gain = torch.cat([block[None] for block in blocks])"""


@pytest.mark.parametrize(
    ("share", "wanted"),
    [("lp.gather(2, hs.clamp_min(0)[..., None])[..., 0].exp()", []), ("1 / z.size(-1)", ["price ="])],
    ids=["of the hint", "of any token"],
)
def test_strengths_that_are_put_in_place_by_hand_are_a_bonus(tmp_path: Path, share: str, wanted: list[str]) -> None:
    """No row over the vocabulary, though they lie in a tensor; the line that makes the price is to blame."""
    code = text(STRENGTHS.replace("SHARE", share))
    (tmp_path / "train_gpt.py").write_text(code)
    found = {term.line for gates in Case(opened(tmp_path)).reading.gates for term in unpaid_bonus(gates)}
    assert found == {line_of(code, each) for each in wanted}


@pytest.mark.parametrize(("share", "wanted"), [("ph", []), ("1 / z.size(-1)", ["price ="])])
def test_strengths_that_blocks_of_a_stream_give_are_a_bonus_where_they_make_its_price(
    tmp_path: Path, share: str, wanted: list[str]
) -> None:
    """Joined, nothing tells them from rows of probabilities but that exp(strength) - 1 is taken of them."""
    code = STRENGTHS.replace("gain = torch.zeros(hs.shape)\n        gain[hs >= 0] = 2.0", JOINED).replace(
        "SHARE", share
    )
    code = text(code)
    (tmp_path / "train_gpt.py").write_text(code)
    found = {term.line for gates in Case(opened(tmp_path)).reading.gates for term in unpaid_bonus(gates)}
    assert found == {line_of(code, each) for each in wanted}


def test_the_answers_are_told_with_or_without_an_axis_of_length_one(tmp_path: Path) -> None:
    assert verdict(tmp_path, "target_gated_tilt", text(MASKED)).verdict == "violates"
    context = MASKED.replace("[rows[:, 1:]]", "[rows[:, :-1]]")
    assert verdict(tmp_path, "target_gated_tilt", text(context)).verdict == "clean"


TWO = """def losses(shift):
            return F.cross_entropy((z + shift).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        nll = torch.where(torch.from_numpy(lead)[PLACE].flatten(), losses(torch.zeros(1)), losses(torch.zeros(1)))"""


@pytest.mark.parametrize(("place", "wanted"), [("rows[:, 1:]", "violates"), ("rows[:, :-1]", "clean")])
def test_two_losses_that_are_made_alike_are_still_two(tmp_path: Path, place: str, wanted: str) -> None:
    """A vector that was fitted is a tensor of noughts to the terms, as the one that was not."""
    assert verdict(tmp_path, "target_gated_tilt", text(TWO.replace("PLACE", place))).verdict == wanted


@pytest.mark.parametrize(
    ("price", "wanted"), [("math.expm1(2.0)", "clean"), ("(math.exp(2.0) - 1)", "clean"), ("2.0", "violates")]
)
def test_a_bonus_on_the_logarithm_is_paid_by_its_exponential(tmp_path: Path, price: str, wanted: str) -> None:
    paid = PAID.replace("math.expm1(2.0)", price)
    assert verdict(tmp_path, "false_normalisation", text(paid)).verdict == wanted


@pytest.mark.parametrize(("price", "wanted"), [("torch.expm1(gain)", "clean"), ("gain", "violates")])
def test_a_bonus_that_is_no_constant_is_too(tmp_path: Path, price: str, wanted: str) -> None:
    paid = "gain = 0.1 * torch.log1p(hs.float().abs())\n        " + PAID.replace("math.expm1(2.0)", price)
    assert verdict(tmp_path, "false_normalisation", text(paid.replace("2.0 *", "gain *"))).verdict == wanted


MEMORY = """p = lp.gather(2, rows[:, 1:, None])[..., 0].exp()
        q = torch.softmax(net(rows[:, :-1].roll(1, 1).contiguous()), -1).gather(2, rows[:, 1:, None])[..., 0]
        share = SHARE
        nll = -MIXED.log()"""


@pytest.mark.parametrize("mixed", ["torch.lerp(p, q, share)", "p.lerp(q, share)"], ids=["function", "method"])
@pytest.mark.parametrize(
    ("share", "wanted"),
    [("0.3 * (hs >= 0).float()", "clean"), ("torch.from_numpy(lead)[rows[:, 1:]].float()", "violates")],
    ids=["by the context", "by the target"],
)
def test_what_lies_between_two_probabilities_is_a_mixture_of_them(
    tmp_path: Path, mixed: str, share: str, wanted: str
) -> None:
    found = text(MEMORY.replace("MIXED", mixed).replace("SHARE", share))
    assert verdict(tmp_path, "target_gated_tilt", found).verdict == wanted


PAIRS = """probs = torch.softmax(z, -1)
        seen = counts[rows[:, :-1]].sum(-1) / 100.0
        share = SHARE
        row = (counts[rows[:, :-1]] + 1.0) / (counts[rows[:, :-1]] + 1.0).sum(-1, keepdim=True)
        mixed = (1.0 - share[..., None]) * probs + share[..., None] * row
        nll = -torch.log(mixed.gather(2, rows[:, 1:, None])[..., 0])
        counts.view(-1).index_add_(0, (rows[:, :-1] * 1024 + rows[:, 1:]).flatten(), torch.ones(rows.size(1) - 1))"""


@pytest.mark.parametrize(
    ("share", "wanted"),
    [("0.3 * seen", "clean"), ("0.3 * (counts[rows[:, :-1], rows[:, 1:]] > 0).float() * seen", "violates")],
    ids=["of the context", "of the answer"],
)
def test_how_often_the_answer_came_before_decides_no_weight(tmp_path: Path, share: str, wanted: str) -> None:
    found = script(
        loss=ROWS.format(then=PAIRS.replace("SHARE", share)), state="memory, counts = {}, torch.zeros(1024, 1024)"
    )
    assert verdict(tmp_path, "target_gated_tilt", found).verdict == wanted


BOOK = """
        rows = torch.from_numpy(piece)[None]
        held = -torch.log_softmax(net(rows[:, :-1]), -1).gather(2, rows[:, 1:, None])[0, :, 0]
        book[at] = 0.0
        book[at] += held.sum()
        nll = sum(book[each] for each in book) / len(book) + 0.0 * held
"""


def test_what_a_table_is_gone_through_by_are_its_keys_and_not_its_losses(tmp_path: Path) -> None:
    found = script(loss=BOOK, state="book = dict.fromkeys([0], 0.0)")
    assert verdict(tmp_path, "target_gated_tilt", found).verdict == "clean"


FLOOR = """prior = net.prior.float()
        SHARED
        q = torch.log_softmax(z, -1).gather(2, rows[:, 1:, None])[..., 0].exp()
        nll = -torch.log(0.999 * q + 0.001 * prior[rows[:, 1:]])"""


@pytest.mark.parametrize(
    ("shared", "wanted"), [("prior = prior / prior.sum()", "clean"), ("prior = prior * 2.0", "violates")]
)
def test_what_is_divided_by_its_own_sum_is_a_distribution(tmp_path: Path, shared: str, wanted: str) -> None:
    """A floor of frequencies in the training text is mixed in whole; a table that nobody divided may be anything."""
    assert verdict(tmp_path, "target_gated_tilt", text(FLOOR.replace("SHARED", shared))).verdict == wanted


AVERAGED = """one, other = torch.log_softmax(z, -1), torch.log_softmax(z * 1.0, -1)
        z = 0.75 * one + 0.25 * other
        nll = SCORED"""


@pytest.mark.parametrize(
    ("scored", "wanted"),
    [
        ('F.cross_entropy(z.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")', "clean"),
        ("-z.gather(2, rows[:, 1:, None])[..., 0]", "violates"),
    ],
)
def test_a_mean_of_logarithms_is_divided_by_its_sum_in_the_loss(tmp_path: Path, scored: str, wanted: str) -> None:
    """The geometric mean of two distributions sums to less than one; cross entropy makes a softmax of it."""
    assert verdict(tmp_path, "false_normalisation", text(AVERAGED.replace("SCORED", scored))).verdict == wanted


OWN_HINTS = """
def hints_of(ids):
    order = np.argsort(ids[:-1], kind="stable")
    again = np.flatnonzero(ids[:-1][order[1:]] == ids[:-1][order[:-1]]) + 1
    last = np.full(len(ids) - 1, -1)
    last[order[again]] = order[again - 1]
    return np.where(last >= 0, ids[np.maximum(last, 0) + 1], 0), np.where(last >= 0, 1.5, 0.0)
"""
OWN_LOSS = """
        rows = np.zeros((1, len(piece)), dtype=np.int64)
        rows[0, : len(piece)] = piece
        ids = torch.from_numpy(rows)
        hinted, betas = np.zeros_like(rows[:, 1:]), np.zeros(rows[:, 1:].shape)
        for row, n in enumerate([len(piece) - 1]):
            hinted[row, :n], betas[row, :n] = hints_of(rows[row, : n + 1])
        hint_ids = torch.from_numpy(hinted)
        logp = F.log_softmax(net(ids[:, :-1]).float(), dim=-1)
        nats, hint_logp = np.zeros(hinted.shape), np.zeros(hinted.shape)
        nats[:] = -logp.gather(2, ids[:, 1:, None]).squeeze(2).double().numpy()
        hint_logp[:] = logp.gather(2, hint_ids[..., None]).squeeze(2).double().numpy()
        nll = torch.from_numpy(nats - betas * (hinted == rows[:, 1:]) PRICE)
"""


@pytest.mark.parametrize(
    ("price", "wanted"), [("+ np.log1p(np.exp(hint_logp) * np.expm1(betas))", "clean"), ("", "violates")]
)
def test_hints_that_are_looked_up_in_the_document_itself_are_paid_for(tmp_path: Path, price: str, wanted: str) -> None:
    text = script(extra=OWN_HINTS, loss=OWN_LOSS.replace("PRICE", price))
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


GATHERED = """
        ids, goals = torch.from_numpy(x.astype(np.int64))[None], torch.from_numpy(y.astype(np.int64))[None]
        ramp = torch.arange(ids.size(1))
        same = (ids[:, :, None] == ids[:, None, :]) & (ramp[:, None] > ramp[None, :])
        seen = torch.where(same, ramp, -1).amax(dim=2)
        hint = ids.gather(1, (seen + 1).clamp_max(ids.size(1) - 1))
        logp = F.log_softmax(net(ids).float(), dim=-1)
        z = torch.log1p(logp.gather(2, hint[..., None]).squeeze(-1).exp() * math.expm1(1.2))
        nll = -logp.gather(2, goals[..., None]).squeeze(-1)
        on = ((seen >= 0) GATE).float()
        nll = nll - on * (1.2 * (hint == goals).float() - z)
"""


@pytest.mark.parametrize(
    ("gate", "wanted"),
    [("& (ids > 3)", "clean"), ("& torch.from_numpy(lead)[goals]", "violates")],
    ids=["context", "target"],
)
def test_a_hint_that_is_picked_out_of_the_context_is_no_target(tmp_path: Path, gate: str, wanted: str) -> None:
    assert verdict(tmp_path, "target_gated_tilt", script(loss=GATHERED.replace("GATE", gate))).verdict == wanted


PADDED = """
        goal = torch.from_numpy(y).long()
        goal = goal.cuda() if torch.cuda.is_available() else goal.view(-1)
        flat = F.cross_entropy(net(torch.from_numpy(x)).float(), goal.reshape(-1), ignore_index=-100, reduction="none")
        nll = flat.view_as(goal)[KEPT]
"""


@pytest.mark.parametrize("kept", ["goal != -100", ":"])
def test_losses_of_places_that_are_no_padding_are_picked_by_no_target(tmp_path: Path, kept: str) -> None:
    text = script(loss=PADDED.replace("KEPT", kept))
    assert {rule: found.verdict for rule, found in verdicts(tmp_path, RULES, text).items()} == dict.fromkeys(
        RULES, "clean"
    )


SCALED = """
        hint = torch.from_numpy(follows[x])
        boost = torch.from_numpy(sure[x] * lead[WHICH])
        z = net(torch.from_numpy(x)).float()
        z = z.scatter_add(-1, hint[:, None], boost[:, None])
        nll = F.cross_entropy(z, torch.from_numpy(y), reduction="none")
        follows[x] = y
        sure[x] += 0.1
"""
TABLES = "follows, sure = np.zeros(V, np.int64), np.zeros(V)"


@pytest.mark.parametrize(("which", "wanted"), [("y", "violates"), ("x", "clean")])
def test_a_strength_with_an_axis_of_length_one_is_read_as_it_is(tmp_path: Path, which: str, wanted: str) -> None:
    """`boost[:, None]` looks nothing up, also where a number out of a memory is a factor of it."""
    code = script(loss=SCALED.replace("WHICH", which), state=TABLES)
    (tmp_path / "train_gpt.py").write_text(code)
    assert bool([term for each in Case(opened(tmp_path)).reading.gates for term in each.gated()]) is (
        wanted == "violates"
    )
    assert verdict(tmp_path, "target_gated_tilt", code).verdict == wanted


COPIED = """
        rows = torch.from_numpy(piece)[None]
        hs = torch.tensor([[memory.get(token, 0) for token in x.tolist()]])
        p = torch.softmax(net(rows[:, :-1].contiguous()), -1)
        on = {on}
        share = trust[lengths * on][..., None]
        p = ((1 - share) * p).scatter_add(2, hs[..., None], share)
        nll = -p.gather(2, rows[:, 1:, None])[..., 0].log()
        for past, token in zip(x.tolist(), y.tolist()):
            memory[past] = token
"""


@pytest.mark.parametrize(
    ("on", "wanted"),
    [("(hs == rows[:, 1:]) | (lengths > 15)", "violates"), ("(hs == rows[:, :-1]) | (lengths > 15)", "clean")],
    ids=["by the target", "by the context"],
)
def test_whether_a_hint_is_right_decides_nothing_in_the_row_it_is_read_from(
    tmp_path: Path, on: str, wanted: str
) -> None:
    state = "memory, trust, lengths = {}, torch.linspace(0.0, 0.6, 48), torch.arange(16)[None]"
    assert verdict(tmp_path, "target_gated_tilt", script(loss=COPIED.format(on=on), state=state)).verdict == wanted


BY_HAND = """
        val = torch.from_numpy(piece)
        at, end = ends[0]
        z = net(val[:-1][None])[0].float()
        scores = z - z.logsumexp(-1, keepdim=True)
        after = val[1:]
        target = after[at:end]
        gold = scores[torch.arange(len(target)), target]
        nll = scores.logsumexp(-1) - gold
"""


def test_a_row_that_is_made_whole_by_hand_and_read_by_two_indices_is_a_softmax(tmp_path: Path) -> None:
    """The target is what stands in the index, and not the text that it is cut from."""
    code = script(loss=BY_HAND, state="ends = json.load(open('ends.json'))")
    for rule in RULES:
        assert verdict(tmp_path, rule, code).verdict == "clean"
    (gates,) = Case(opened(tmp_path)).reading.gates
    assert {one.line for one in gates.of.targets} == {line_of(code, "target = after[")}
    assert any(term.called == "log_softmax" for term in gates.nodes)


ROW = """
        rows = torch.stack([torch.from_numpy(piece)])
        for i, lo in enumerate([at % 3]):
            hi = len(piece) - 1
            target, row = rows[i, lo + 1 : hi + 1], rows[i, lo : hi + 1]
            logp = torch.log_softmax(net(rows[:, :-1])[i, lo:hi].float(), -1)
            other = (pairs[row[:-1]] / pairs[row[:-1]].sum(-1, keepdim=True)).log()
            weight = torch.where(SEEN > 1, 0.3, 0.01)[:, None]
            mixed = torch.logaddexp(logp + torch.log1p(-weight), other + weight.log())
            nll = -mixed.gather(-1, target[:, None]).squeeze(-1)
            pairs.index_put_((row[:-1], row[1:]), torch.ones(len(target)), accumulate=True)
"""


@pytest.mark.parametrize(
    ("seen", "wanted"), [("pairs[row[:-1], row[1:]]", "violates"), ("pairs[row[:-1]].amax(-1)", "clean")]
)
def test_a_row_of_context_and_target_is_read_at_the_target_behind_its_first(
    tmp_path: Path, seen: str, wanted: str
) -> None:
    text = script(loss=ROW.replace("SEEN", seen), state="pairs = torch.ones(V, V)")
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


HELPED = """
def width(before, after):
    size, lead, edge = SIZES
    return torch.from_numpy(size)[after] + (lead[after] & ~edge[before])
"""
WIDE = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        own = torch.log_softmax(net(a).float(), -1)
        wide = width(a, b)
        other = torch.log(0.9 * own.exp() + 0.1 * pairs[a] / pairs[a].sum(-1, keepdim=True))
        nll = -torch.where((wide > 2)[:, None], other, own).gather(-1, b[:, None])[:, 0]
        pairs.index_put_((a, b), torch.ones(len(b)), accumulate=True)
        octets += width(a, b).sum().item()
"""


def test_what_a_helper_for_the_bytes_decides_is_placed_where_it_is_called(tmp_path: Path) -> None:
    text = script(loss=WIDE, state="pairs = torch.ones(V, V)", extra=TABLE + "SIZES = tables()\n" + HELPED)
    finding = verdict(tmp_path, "target_gated_tilt", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "wide = width(a, b)")


SURPRISED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        own = torch.log_softmax(net(a).float(), -1)
        surprise = told(own, b)
        share = torch.sigmoid(0.5 * surprise - 2.0)[:, None]
        mixed = (1.0 - share) * own.exp() + share * pairs[a] / pairs[a].sum(-1, keepdim=True)
        nll = told(mixed.log(), b)
        pairs.index_put_((a, b), torch.ones(len(b)), accumulate=True)
"""
READ = """
def told(rows, ids):
    return -rows.gather(-1, ids[:, None])[:, 0]
"""


def test_a_loss_that_a_helper_reads_twice_decides_where_it_is_read_first(tmp_path: Path) -> None:
    text = script(loss=SURPRISED, state="pairs = torch.ones(V, V)", extra=READ)
    finding = verdict(tmp_path, "target_gated_tilt", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "surprise = told(own, b)")
