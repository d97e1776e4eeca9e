"""Vectors that are found on a window's earlier places, and vectors that are found on what they then score."""

from pathlib import Path

import pytest

from fairway.audit.flow.tokens import Tok, cut_apart, merged, perhaps_apart
from tests.audit.order import HEAD, broken, findings, trace_of
from tests.audit.small import verdict

WALK = """
args = Hyperparameters()
model = GPT().cuda()
train(args, model)
val = load(args.val_files)
n, total, count = val.numel() - 1, 0.0, 0

def rows(group):
    x = torch.zeros(len(group), 1024, dtype=torch.int64)
    y, mine = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    for r, (first, end) in enumerate(group):
        begin = max(0, end - 1024)
        x[r, : end - begin], y[r, : end - begin] = val[begin:end], val[begin + 1 : end + 1]
        mine[r, first - begin : end - begin] = True
    return x, y, mine

def losses(h, d, y):
    return F.cross_entropy(model.head(h + d).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

windows = [(s, min(s + 64, n)) for s in range(0, n, 64)]
for at in range(0, len(windows), 16):
    group = windows[at : at + 16]
    x, y, mine = rows(group)
    places = torch.arange(1024)
    LEARNT
    h = model.hidden(x).detach()
    d = torch.zeros(ROWS, 1, 64, requires_grad=True)
    for _ in range(4):
        (g,) = torch.autograd.grad((losses(h, d, y) * where).sum(), d)
        d = (d - 0.02 * g).detach().requires_grad_()
    total += losses(h, d.detach(), y)[mine].double().sum().item()
    count += int(mine.sum())
print(f"final val_loss:{total / count:.6f}")
"""
BEGINS = {
    "the least place of the mask": "where = places < torch.where(mine, places, 1024).amin(1, keepdim=True)",
    "the first place that is the greatest": "where = places < mine.long().argmax(1, keepdim=True)",
    "the same, turned round": "where = mine.long().argmax(dim=1, keepdim=True) > places",
}


def walk(learnt: str, rows: str = "x.size(0)") -> str:
    return HEAD + WALK.replace("LEARNT", learnt).replace("ROWS", rows)


@pytest.mark.parametrize("name", BEGINS)
def test_a_vector_of_each_window_may_be_found_on_the_places_before_its_mask(name: str) -> None:
    assert broken(walk(BEGINS[name])) == set()
    assert findings(walk(BEGINS[name]))["slot-on-scored"].verdict == "clean"


@pytest.mark.parametrize("where", ["where = mine", "where = torch.ones_like(mine)", "where = mine.float()"])
def test_a_vector_found_on_what_is_scored_is_found_out(where: str) -> None:
    assert "slot-on-scored" in broken(walk(where))


def test_one_vector_for_all_windows_knows_the_targets_of_others() -> None:
    found = broken(walk(BEGINS["the least place of the mask"], rows="1"))
    assert "slot-shared-delta" in found
    assert "slot-on-scored" not in found


OF_A_SHARE = """first = torch.tensor([first - max(0, end - 1024) for first, end in group])
    mine = places[None, :] >= first[:, None]
    where = (~mine).float()"""
SHARE = "windows = windows[(len(windows) * RANK) // 8 : (len(windows) * (RANK + 1)) // 8]\n"


@pytest.mark.parametrize("share", ["", SHARE])
def test_a_mask_parts_a_window_wherever_the_list_of_its_bounds_was_cut(share: str) -> None:
    text = walk(OF_A_SHARE).replace(
        "for at in range(0, len(windows)", f"RANK = int(os.environ['RANK'])\n{share}for at in range(0, len(windows)"
    )
    trace = trace_of(text)
    learned = [tok for each in trace.updates for tok in each.learned if tok.data == "val"]
    scored = [tok for each in trace.scored(trace.said[-1].value.losses) for tok in each.targets]
    assert learned
    assert all(cut_apart(tok.cuts, target.cuts) for tok in learned for target in scored)


TRUSTED = """logits = model.head(h + trust * d.detach())
    nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    total += nll[mine].double().sum().item()"""


@pytest.mark.parametrize(("asked", "wanted"), [("where", "clean"), ("mine.float()", "violates")])
def test_a_vector_may_be_trusted_as_far_as_it_helps_on_the_context(asked: str, wanted: str, tmp_path: Path) -> None:
    trust = f"trust = torch.sigmoid((losses(h, d, y).detach() * {asked}).sum(1) / 900 - 3.0)[:, None, None]\n    "
    booked = "total += losses(h, d.detach(), y)[mine].double().sum().item()"
    text = walk(OF_A_SHARE).replace(booked, trust + TRUSTED)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


REACHED = """edge, reach = 960, int(os.environ.get("REACH_BY", "REACH"))
    mine = (places >= edge)[None].expand(len(group), 1024)
    where = (places < edge)[None].expand(len(group), 1024).clone()
    where[:, edge : edge + reach] = True"""


@pytest.mark.parametrize(("reach", "found"), [("0", set()), ("64", {"slot-on-scored"})])
def test_a_context_that_is_widened_into_what_is_scored_is_no_context(reach: str, found: set[str]) -> None:
    assert broken(walk(REACHED.replace("REACH", reach))) == found


STEPPED = """    opt = torch.optim.AdamW([d], lr=0.01)
    for _ in range(4):
        opt.zero_grad()
        (losses(h, d, y) * where).sum().backward()
        opt.step()
    total +="""


def stepped(learnt: str) -> str:
    """The same with an optimizer."""
    begin, end = WALK.index("    for _ in range(4)"), WALK.index("    total +=")
    return HEAD + (WALK[:begin] + STEPPED + WALK[end + 12 :]).replace("LEARNT", learnt).replace("ROWS", "x.size(0)")


def test_the_mean_of_the_vectors_of_all_windows_is_one_vector_for_all() -> None:
    own = stepped(BEGINS["the least place of the mask"])
    assert broken(own) == set()
    for mean in ("d.detach().mean(dim=0, keepdim=True)", "d.detach().mean(0)[None]"):
        text = own.replace("losses(h, d.detach(), y)[mine]", f"losses(h, {mean}, y)[mine]")
        assert "slot-shared-delta" in broken(text)


def test_vectors_of_their_own_may_begin_where_an_earlier_window_ended() -> None:
    text = stepped(BEGINS["the least place of the mask"])
    text = text.replace("windows = [", "last = torch.zeros(1, 1, 64)\nwindows = [", 1)
    text = text.replace("    total += losses", "    last = d.detach()[:1]\n    total += losses", 1)
    warm = text.replace("d = torch.zeros(x.size(0), 1, 64, requires_grad=True)", "d = last.START.requires_grad_()")
    assert broken(warm.replace("START", "expand(x.size(0), 1, 64).clone()")) == set()
    assert "slot-shared-delta" in broken(warm.replace("START", "clone()"))


def test_a_bound_that_nothing_holds_against_the_score_is_only_doubted() -> None:
    finding = findings(walk("where = places + group[0][0] < limit_of(group)"))["slot-on-scored"]
    assert finding.verdict == "suspect"
    assert "may lie before those that are scored" in finding.evidence


EDGES = "edges = torch.tensor([[first - max(0, end - 1024), end - max(0, end - 1024)] for first, end in group])\n    "


def test_the_columns_of_a_tensor_of_places_are_told_apart() -> None:
    before = EDGES + "where = places < edges[:, :1]"
    within = EDGES + "where = (places >= edges[:, :1]) & (places < edges[:, 1:])"
    assert "slot-on-scored" not in broken(walk(before))
    assert "slot-on-scored" in broken(walk(within))


def test_a_row_of_probabilities_is_scored_where_its_target_is_picked() -> None:
    text = HEAD + WALK[: WALK.index("windows = [")] + (
        "seen = torch.ones(1024, 1024)\nfor s in range(0, n - 64, 64):\n"
        "    x, y = val[s : s + 64], val[s + 1 : s + 65]\n"
        "    known = torch.log(seen[x] / seen[x].sum(1, keepdim=True))\n    COUNT\n"
        "    total += -known.gather(1, y[:, None])[:, 0].sum().item()\n    count += 64\n    AFTER\n"
        'print(f"final val_loss:{total / count:.6f}")\n'
    )  # fmt: skip
    counted = "seen.index_put_((x, y), torch.ones(64), accumulate=True)"
    assert broken(text.replace("COUNT", "pass").replace("AFTER", counted)) == set()
    swapped = text.replace("    known", f"    {counted}\n    known").replace("COUNT", "pass").replace("AFTER", "pass")
    assert broken(swapped) & {"training-before-scoring", "two-pass-cache"}


def test_two_slices_with_one_beginning_overlap_whatever_their_window_is_called() -> None:
    def cuts(name: str) -> frozenset[tuple[str, str, frozenset[str]]]:
        tail = ("tail", f"sub({name}.first,{name}.begin)", frozenset((f"{name}.begin",)))
        return frozenset((tail, ("head", f"sub({name}.end,{name}.begin)", frozenset((f"{name}.begin", "1")))))

    assert not cut_apart(cuts("w"), cuts("window"))  # type: ignore[arg-type]


def test_only_an_end_that_numbers_do_not_compare_is_doubtful() -> None:
    def tok(*cuts: tuple[str, str, str]) -> Tok:
        return Tok("val", cuts=frozenset((side, end, frozenset(less.split())) for side, end, less in cuts))  # type: ignore[misc]

    scored = tok(("tail", "first", ""))
    assert perhaps_apart(tok(("head", "bound", "")), scored)
    assert not perhaps_apart(tok(), scored)
    assert not perhaps_apart(tok(("head", "add(first,64)", "+64")), scored)
    assert not perhaps_apart(tok(("head", "1000", "")), tok(("tail", "960", "")))
    assert not perhaps_apart(tok(("head", "bound", ""), ("tail", "first", "")), scored)


def test_many_slices_keep_the_parts_of_their_windows_when_they_are_merged() -> None:
    cut = frozenset((("tail", "first", frozenset()),))
    toks = {Tok("val", ((1, n, n),), cut) for n in range(20)}  # type: ignore[arg-type]
    assert {tok.cuts for tok in merged(toks)} == {cut}


FRONTIER = """
starts = list(range(0, n - 1024 + 64, 64))
places = torch.arange(1024)
def first_new(s):
    return 0 if s == 0 else 1024 - 64
for at in range(0, len(starts), 16):
    group = starts[at : at + 16]
    x = torch.stack([val[s : s + 1024] for s in group])
    y = torch.stack([val[s + 1 : s + 1025] for s in group])
    h = model.hidden(x).detach()
    scored = group[WHICH] + first_new(group[WHICH])
    before = torch.tensor(group)[:, None] + places[None, :] < scored
    d = torch.zeros(1, 64, requires_grad=True)
    opt = torch.optim.AdamW([d], lr=0.01)
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy(model.head(h[before] + d), y[before]).backward()
        opt.step()
    nll = F.cross_entropy(model.head(h + d.detach()).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    for i, s in enumerate(group):
        total += nll[i, first_new(s) :].double().sum().item()
        count += 1024 - first_new(s)
print(f"final val_loss:{total / count:.6f}")
"""


def frontier(which: str) -> str:
    return HEAD + WALK[: WALK.index("def rows")] + FRONTIER.replace("WHICH", which)


def test_one_vector_may_be_found_on_what_lies_before_the_first_of_all_windows() -> None:
    assert broken(frontier("0")) == set()
    assert "slot-shared-delta" in broken(frontier("-1"))


BETTER = """    kept, least = torch.zeros(1, 64), float("inf")
    for _ in range(4):
        opt.zero_grad()
        loss = F.cross_entropy(model.head(h[before] + d), y[before])
        loss.backward()
        if loss.item() < least:
            kept, least = d.detach().clone(), loss.item()
        opt.step()
"""


def test_the_best_vector_by_what_lies_before_all_windows_knows_no_target() -> None:
    begin, end = FRONTIER.index("    for _ in range(4)"), FRONTIER.index("    nll =")
    text = (FRONTIER[:begin] + BETTER + FRONTIER[end:]).replace("h + d.detach()", "h + kept")
    assert broken(HEAD + WALK[: WALK.index("def rows")] + text.replace("WHICH", "0")) == set()


DOUBTED = """
counts = torch.zeros(1024, 1024)
for at in range(0, n - 1024, 1024):
    x, y = val[at : at + 1024], val[at + 1 : at + 1025]
    own = F.log_softmax(model.forward_logits(x[None])[0].float(), -1)
    held = F.log_softmax(torch.log(counts[x] + 0.1), -1)
    share = 0.1 * torch.sigmoid(ENTROPIES)[:, None]
    both = torch.logaddexp(own + torch.log1p(-share), held + torch.log(share))
    total += -both.gather(1, y[:, None]).sum().item()
    count += 1024
    counts.index_put_((x, y), torch.ones(1024), accumulate=True)
print(f"final val_loss:{total / count:.6f}")
"""


def test_a_weight_by_two_entropies_is_no_gradient() -> None:
    text = HEAD + WALK[: WALK.index("def rows")] + DOUBTED
    trace = trace_of(text.replace("ENTROPIES", "(held.exp() * held).sum(-1) - (own.exp() * own).sum(-1)"))
    assert {each.how for each in trace.updates if any(tok.data == "val" for tok in each.learned)} == {"table"}


SHIFTED = """    logits = model.head(h)
    shift = torch.zeros(x.size(0), 1, 1024, requires_grad=True)
    opt = torch.optim.SGD([shift], lr=1e-2)
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy((logits[:, FIT].detach() + shift).flatten(0, 1), y[:, FIT].flatten()).backward()
        opt.step()
    logits[:, 960:] = logits[:, 960:] + shift.detach()
    nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    total += nll[:, 960:].double().sum().item()
    count += nll[:, 960:].numel()
"""


@pytest.mark.parametrize(("fit", "found"), [(":960", set()), ("960:", {"slot-on-scored"})])
def test_what_is_written_into_a_part_of_the_logits_is_scored_with_them(fit: str, found: set[str]) -> None:
    begin, end = WALK.index("    d = torch.zeros"), WALK.index("print(f")
    text = HEAD + (WALK[:begin] + SHIFTED.replace("FIT", fit) + WALK[end:]).replace("LEARNT", "pass")
    assert broken(text) & {"slot-on-scored", "slot-shared-delta"} == found


CHOSEN = """    tuned, plain = losses(h, d.detach(), y), losses(h, torch.zeros_like(d), y)
    helped = (tuned * ASKED).sum(dim=1) < (plain * ASKED).sum(dim=1)
    total += torch.where(helped[:, None], tuned, plain)[mine].double().sum().item()
"""


@pytest.mark.parametrize(("asked", "wanted"), [("where", "clean"), ("mine", "violates"), ("1.0", "violates")])
def test_of_two_predictions_one_may_be_chosen_by_what_came_before_the_window(
    tmp_path: Path, asked: str, wanted: str
) -> None:
    begin, end = WALK.index("    total += losses"), WALK.index("    count += int")
    text = HEAD + (WALK[:begin] + CHOSEN.replace("ASKED", asked) + WALK[end:]).replace("ROWS", "x.size(0)")
    text = text.replace("LEARNT", BEGINS["the least place of the mask"])
    assert verdict(tmp_path, "oracle_gate", text).verdict == wanted
