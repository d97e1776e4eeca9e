"""Hints for all of the text at once, by sorting its contexts: what looks back is no table, what looks ahead is one."""

import pytest

from tests.audit.order import HEAD, broken, findings, line_of, trace_of
from tests.audit.test_flow_forms import whole

KEYS = """
ids = val.numpy()
keys = np.zeros(ids.size, dtype=np.uint64)
for k in range(1, 4):
    keys[k:] = keys[k:] * np.uint64(31) + ids[:-k].astype(np.uint64) + np.uint64(1)
"""
SCORED = """
hints = torch.as_tensor(hint)
for s in range(0, n - 1024, 1024):
    goal, told = val[s + 1 : s + 1025], hints[s + 1 : s + 1025]
    logp = torch.log_softmax(net.logits(val[s : s + 1024]).float(), -1)
    nll = -logp.gather(-1, goal[:, None]).squeeze(-1)
    there = told >= 0
    p = logp.gather(-1, told.clamp_min(0)[:, None]).squeeze(-1).exp()
    nll = nll + torch.log1p(p * math.expm1(1.5)) * there - 1.5 * ((told == goal) & there)
    total += nll.sum().item()
    count += 1024
"""
THROUGH_VIEWS = """
by = np.argsort(keys, kind="stable")
alike = np.zeros(ids.size, dtype=bool)
alike[1:] = keys[by[1:]] == keys[by[:-1]]
found = np.full(ids.size, -1, dtype=np.int64)
follower = ids[by].astype(np.int64)
found[TO][alike[1:]] = follower[FROM][alike[1:]]
hint = np.full(ids.size, -1, dtype=np.int64)
hint[by] = found
"""
BY_PLACES = """
keys = torch.as_tensor(keys.astype(np.int64))
ordered, by = torch.sort(keys, stable=True)
alike = ordered[1:] == ordered[:-1]
tokens = torch.as_tensor(ids)
hint = torch.full((ids.size,), -1, dtype=torch.int64)
hint[by[TO]] = torch.where(alike, tokens[by[FROM]], -1)
"""
OF_THE_GROUP = """
by = np.argsort(keys, kind="stable")
fresh = np.ones(ids.size, dtype=bool)
fresh[1:] = keys[by][1:] != keys[by][:-1]
group = np.cumsum(fresh) - 1
final = np.zeros(ids.size, dtype=np.int64)
final[group] = ids[by]
hint = np.full(ids.size, -1, dtype=np.int64)
hint[by] = final[group]
"""
WAYS = {"through views": THROUGH_VIEWS, "by places": BY_PLACES}


def scored(hints: str, to: str = "1:", of: str = ":-1") -> str:
    return whole(KEYS + hints.replace("TO", to).replace("FROM", of) + SCORED)


@pytest.mark.parametrize("way", WAYS)
def test_the_last_earlier_place_of_a_context_may_be_found_by_sorting_all_of_them(way: str) -> None:
    assert broken(scored(WAYS[way])) == set()


@pytest.mark.parametrize("way", WAYS)
def test_the_next_place_of_a_context_is_in_a_table_of_what_comes(way: str) -> None:
    text = scored(WAYS[way], ":-1", "1:")
    assert broken(text) == {"two-pass-cache"}


def test_the_last_place_of_all_is_in_a_table_of_what_comes() -> None:
    text = scored(OF_THE_GROUP)
    assert broken(text) == {"two-pass-cache"}
    place = findings(text)["two-pass-cache"].place
    assert place is not None
    assert place.line == line_of(text, "final[group] = ids[by]")


def test_a_sort_that_keeps_no_order_among_alike_ones_says_nothing_of_what_is_earlier() -> None:
    text = scored(THROUGH_VIEWS.replace(', kind="stable"', ""))
    assert "two-pass-cache" in broken(text)


def test_what_is_written_into_a_part_of_a_part_lies_in_all_of_it() -> None:
    rows = """
for s in range(0, n - 1024, 1024):
    x, y = torch.zeros(2, 1024, dtype=torch.int64), torch.zeros(2, 1024, dtype=torch.int64)
    x[0][:1024], y[0][:1024] = val[s : s + 1024], val[s + 1 : s + 1025]
    LOSS
    count += 1024
"""
    booked = "total += net(x[0], y[0]).item() * 1024"
    twice = f"opt.zero_grad(); net(x[0], y[0]).backward(); opt.step()\n    {booked}"
    opt = "opt = torch.optim.SGD(net.parameters(), lr=1e-3)\n"
    assert broken(whole(opt + rows.replace("LOSS", booked))) == set()
    assert "training-before-scoring" in broken(whole(opt + rows.replace("LOSS", twice)))


IN_PARTS = """
val = load("shards_val_*.bin")
docs = [(int(start), 64) for start in torch.nonzero(val == 1)]
parts = [docs[low : low + 8] for low in range(0, len(docs), 8)]
net, total = GPT(), 0.0
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for part in parts:
    for start, many in sorted(part, key=lambda doc: doc[1]):
        net(val[start : start + many][None], val[start + 1 : start + many + 1][None]).backward()
        opt.step()
"""


def test_what_is_sorted_is_still_what_the_turn_of_a_loop_has_taken() -> None:
    trace = trace_of(HEAD + IN_PARTS)
    outer = next(n for n, place in trace.loops.items() if place.line == line_of(HEAD + IN_PARTS, "for part in parts"))
    turns = {span for update in trace.updates for tok in update.learned for span in tok.spans if span[0] == outer}
    assert turns == {(outer, 1, 1), (outer, 2, 2)}
