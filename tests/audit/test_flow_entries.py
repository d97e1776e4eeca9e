"""Hints kept in lists and dicts within a table, filled chunk by chunk: what is read out of an entry is of its table."""

from tests.audit.order import broken, findings, line_of
from tests.audit.test_flow_forms import whole

TABLE = """
class Table:
    def __init__(self):
        self.entries, self.reached = {}, 1

    def hints(self, ids, end):
        found = {}
        for t in range(self.reached, end):
            key = ids[t - 1 : t].tobytes()
            entry = self.entries.get(key)
            if entry is not None and entry[1] > 2:
                found[t] = entry[0]
            self.enter(key, int(ids[t]))
        self.reached = max(self.reached, end)
        return found

    def enter(self, key, token):
        entry = self.entries.get(key)
        if entry is None:
            self.entries[key] = [token, 1, {token: 1}]
            return
        counts = entry[2]
        counts[token] = counts.get(token, 0) + 1
        if counts[token] > entry[1]:
            entry[0], entry[1] = token, counts[token]

table, ids = Table(), val.numpy()
FIRST
for c in range(n // 8192):
    begin = c * 8192
    end = min(begin + 8192, n)
    found = table.hints(ids, end + 1)
    for s in range(begin, end - 1024, 1024):
        goal = val[s + 1 : s + 1025]
        told = torch.tensor([found.get(s + 1 + j, -1) for j in range(1024)])
        logp = torch.log_softmax(net.logits(val[s : s + 1024]).float(), -1)
        nll = -logp.gather(-1, goal[:, None]).squeeze(-1)
        p = logp.gather(-1, told.clamp_min(0)[:, None]).squeeze(-1).exp()
        tilted = nll + torch.log1p(p * math.expm1(1.5)) - 1.5 * (told == goal)
        total += torch.where(told >= 0, tilted, nll).sum().item()
        count += 1024
"""
FILLED = "table.hints(ids, n + 1); table.reached = 1"


def test_hints_out_of_entries_that_grow_with_the_chunks_are_of_the_past() -> None:
    assert broken(whole(TABLE.replace("FIRST", "pass"))) == set()


def test_entries_that_a_first_pass_has_filled_are_found_where_that_is_called() -> None:
    text = whole(TABLE.replace("FIRST", FILLED))
    assert broken(text) == {"two-pass-cache"}
    place = findings(text)["two-pass-cache"].place
    assert place is not None
    assert place.line == line_of(text, FILLED)
