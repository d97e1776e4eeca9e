"""Distributions, their sums: rows that share their counts, short lists, folds of one row, values that were learned."""

from pathlib import Path

import pytest

from tests.audit.small import line_of, script, verdict, verdicts

RULES = ("oracle_gate", "gold_token_ngram", "false_normalisation", "target_gated_tilt", "byte_mixture")

# ---- one place for each pair of row and token

PAIRS = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        row = (a * 40503) % ROWS
        place = {place}
        own = torch.softmax(net(a).float(), -1).gather(-1, b[:, None])[:, 0]
        nll = -torch.log(0.8 * own + 0.2 * pairs[place] / seen[row].clamp_min(1))
        pairs.index_put_((place,), torch.ones(len(b)), accumulate=True)
        seen.index_put_((row,), torch.ones(len(b)), accumulate=True)
"""
COUNTS = "pairs, seen = torch.zeros(ROWS * V), torch.zeros(ROWS)"


@pytest.mark.parametrize("place", ["row * V + b", "(row * V + b) % (ROWS * V)", "(b + V * row) % len(pairs)"])
def test_the_places_of_a_hashed_row_sum_to_the_count_of_the_row(tmp_path: Path, place: str) -> None:
    text = script(loss=PAIRS.format(place=place.replace("len(pairs)", "(V * ROWS)")), state=COUNTS, extra="ROWS = 4096")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"


OF_DOCUMENTS = """
        a, b = torch.from_numpy(x)[None], torch.from_numpy(y)[None]
        nll = F.cross_entropy(net(a).transpose(1, 2), b, reduction="none")
        row, place = (a * 36313) % ROWS, (a * 36313 ^ b * 27191) % ROWS
        documents = torch.arange(len(a))[:, None]
        ratio = pairs[documents, place] / seen[documents, row].clamp_min(1.0)
        nll = -(0.9 * torch.exp(-nll) + 0.1 * ratio).log()
        for table, slot in zip((seen, pairs), (row, place)):
            table.scatter_add_(1, slot, torch.ones(b.shape))
"""


def test_tables_of_documents_are_told_apart_and_their_hashed_places_are_not(tmp_path: Path) -> None:
    """The numbers of the documents are no numbers of all tokens."""
    state = "pairs, seen = torch.zeros(8, ROWS), torch.zeros(8, ROWS)"
    text = script(loss=OF_DOCUMENTS, state=state, extra="ROWS = 4096")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "violates"
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"


SLOTTED = """
class Cache:
    slot = staticmethod(lambda a, b, y=0: (a * 36313 + b * 27191 + y * 127) % ROWS)

    def __init__(self):
        self.ctx, self.full = torch.zeros(ROWS), torch.zeros(ROWS)

    def blend(self, nll, a, b, y):
        met = self.ctx[self.slot(a, b)]
        hit = self.full[self.slot(a, b, NEXT)] / met.clamp_min(1)
        return torch.where(met >= 2, -((1 - 0.2) * (-nll).exp() + 0.2 * hit).log(), nll)

    def learn(self, a, b, y):
        self.ctx.index_add_(0, self.slot(a, b), torch.ones(len(a)))
        self.full.index_add_(0, self.slot(a, b, y), torch.ones(len(a)))
"""


@pytest.mark.parametrize(("after", "wanted"), [("y", "violates"), ("0", "clean")])
def test_a_key_that_a_static_lambda_makes_is_followed(tmp_path: Path, after: str, wanted: str) -> None:
    loss = """
        b, after = torch.from_numpy(x), torch.from_numpy(y)
        a = F.pad(b[:-1], (1, 0))
        nll = cache.blend(F.cross_entropy(net(b).float(), after, reduction="none"), a, b, after)
        cache.learn(a, b, after)
"""
    extra = "ROWS = 4096\n" + SLOTTED.replace("NEXT", after)
    text = script(loss=loss, state="cache = Cache()", extra=extra)
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == wanted


AT_ORDERS = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        own = torch.softmax(net(a).float(), -1).gather(-1, b[:, None])[:, 0]
        key = (x.astype(np.uint64) * 36313) % ROWS
        met = seen[key]
        order, counts = np.where(met > 2, 2, 0), np.zeros(len(y), np.float32)
        for n in (2, 3):
            rows = np.nonzero(order == n)[0]
            for at in range(0, len(rows), 64):
                part = rows[at : at + 64]
                counts[part] = pairs[(key[part] ^ y[part].astype(np.uint64) * 27191) % ROWS]
        share = 0.3 * torch.from_numpy(SHARE).float()
        nll = -torch.log((1 - share) * own + share * torch.from_numpy(counts / np.maximum(met, 1.0)).float())
        np.add.at(seen, key, 1.0)
        np.add.at(pairs, (key ^ y.astype(np.uint64) * 27191) % ROWS, 1.0)
"""


def test_counts_that_are_put_where_an_order_was_met_are_counts(tmp_path: Path) -> None:
    text = script(
        loss=AT_ORDERS.replace("SHARE", "(met / (met + 4.0))"),
        state="pairs, seen = np.zeros(ROWS), np.zeros(ROWS)",
        extra="ROWS = 4096",
    )
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "violates"


RATED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        nll = F.cross_entropy(net(a).float(), b, reduction="none")
        most = CEILINGS[int(ledger.argmin())]
        met = seen[(a * 36313) % ROWS]
        nll = nll - torch.log1p(-0.0 * (most * met / seen[(a * 36313) % ROWS].clamp_min(1.0)))
        for n, each in enumerate(CEILINGS):
            ledger[n] += (nll * each).sum()
        seen.index_add_(0, (a * 36313) % ROWS, torch.ones(len(b)))
"""


def test_one_of_several_settings_is_no_count(tmp_path: Path) -> None:
    """It is picked by losses of what was scored before."""
    state = "ledger, seen = torch.zeros(3), torch.zeros(ROWS)"
    text = script(loss=RATED, state=state, extra="ROWS = 4096\nCEILINGS = (0.35, 0.45, 0.55)")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"


@pytest.mark.parametrize(
    "place", ["(row * V + b) % 1000003", "(row * 31 + b) % (ROWS * 31)", "(row ^ (b * 69069)) % ROWS"]
)
def test_places_that_tokens_of_a_row_share_do_not(tmp_path: Path, place: str) -> None:
    text = script(loss=PAIRS.format(place=place), state=COUNTS, extra="ROWS = 4096")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "violates"


def test_a_row_whose_context_is_counted_elsewhere_is_no_row_of_that_count(tmp_path: Path) -> None:
    loss = PAIRS.format(place="row * V + b").replace("seen[row]", "seen[(a * 69069) % ROWS]")
    text = script(loss=loss, state=COUNTS, extra="ROWS = 4096")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "violates"


def test_a_count_that_a_method_gathers_has_the_gathered_place_for_its_key(tmp_path: Path) -> None:
    """`pairs.gather(1, place)`: the first argument is the dimension."""
    loss = """
        a, b = torch.from_numpy(x)[None], torch.from_numpy(y)[None]
        nll = F.cross_entropy(net(a).transpose(1, 2), b, reduction="none")
        row = (a * 36313) % ROWS
        ratio = pairs.gather(1, PLACE).minimum(seen.gather(1, row)) / seen.gather(1, row).clamp_min(1.0)
        nll = -(0.8 * torch.exp(-nll) + 0.2 * ratio).log()
        pairs.scatter_add_(1, PLACE, torch.ones(b.shape))
        seen.scatter_add_(1, row, torch.ones(b.shape))
"""
    state = "pairs, seen = torch.zeros(1, ROWS), torch.zeros(1, ROWS)"
    text = script(loss=loss.replace("PLACE", "(row ^ (b * 27191)) % ROWS"), state=state, extra="ROWS = 4096")
    finding = verdict(tmp_path, "gold_token_ngram", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "        ratio =")
    text = script(loss=loss.replace("PLACE", "row"), state=state, extra="ROWS = 4096")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"


# ---- a row, and the count that it is divided by

ROW = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        fine = (a * 40503) % (64 * ROWS)
        row = fine % ROWS
        q = (counts[row] + 0.1) / (seen[{key}][:, None] + 0.1 * V)
        nll = -(0.8 * torch.softmax(net(a).float(), -1) + 0.2 * q).gather(-1, b[:, None])[:, 0].log()
        counts.index_put_((row, b), torch.ones(len(b)), accumulate=True)
        seen.index_put_(({key},), torch.ones(len(b)), accumulate=True)
"""
TABLE_OF_ROWS = "counts, seen = torch.zeros(ROWS, V), torch.zeros(64 * ROWS)"


def test_a_row_divided_by_a_finer_contexts_count_does_not_sum_to_one(tmp_path: Path) -> None:
    text = script(loss=ROW.format(key="fine"), state=TABLE_OF_ROWS, extra="ROWS = 4096")
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "q = (counts")


BY_ORDER = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        q = torch.softmax(net(a).float(), -1)
        for order in range(2, 8):
            row, fine = (a * 40503 + order) % ROWS, (a * 40503 + order) % (64 * ROWS)
            q = (counts[order][row] + q) / (seen[order][{key}][:, None] + 1.0)
            FILL
            seen[order].index_add_(0, {key}, torch.ones(len(b)))
        nll = -q.gather(-1, b[:, None])[:, 0].log()
"""
FILLS = {
    "flat": "counts[order].view(-1).index_add_(0, row * V + b, torch.ones(len(b)))",
    "by numpy": "np.add.at(counts[order].reshape(-1), row * V + b, 1)",
    "in place": "counts[order].index_put_((row, b), torch.ones(len(b)), accumulate=True)",
}
TABLES_BY_ORDER = (
    "counts, seen = {n: torch.zeros(ROWS, V) for n in range(2, 8)}, {n: torch.zeros(64 * ROWS) for n in range(2, 8)}"
)


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS.keys())
def test_so_do_rows_of_tables_by_order(tmp_path: Path, fill: str) -> None:
    """A finer count divides a row whatever the row is kept in; it is no ratio of two counts of the target."""
    loss = BY_ORDER.replace("FILL", fill)
    text = script(loss=loss.format(key="fine"), state=TABLES_BY_ORDER, extra="ROWS = 4096")
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == "violates"
    assert "under another key" in finding.evidence
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"
    text = script(loss=loss.format(key="row"), state=TABLES_BY_ORDER, extra="ROWS = 4096")
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


def test_a_row_divided_by_the_count_of_that_row_does(tmp_path: Path) -> None:
    text = script(loss=ROW.format(key="row"), state=TABLE_OF_ROWS, extra="ROWS = 4096")
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


# ---- a short list

SHORT = """
        logits, b = net(torch.from_numpy(x)).float(), torch.from_numpy(y)
        top, which = logits.topk(64)
        hit = which == b[:, None]
        within = torch.logsumexp(top, -1) - (top * hit).sum(-1){paid}
        nll = torch.where(hit.any(-1), within, torch.full_like(within, math.log(1000.0 * V)))
"""


def test_a_floor_for_what_a_short_list_lacks_is_paid_for_within_it(tmp_path: Path) -> None:
    text = script(loss=SHORT.format(paid=" - math.log(0.999)"))
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())
    text = script(loss=SHORT.format(paid="").replace("1000.0 * V", "1000.0"))
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "torch.where(hit")


# ---- what follows the gradient of losses that were booked

LANES = """
from torch.func import grad, vmap

make = lambda name, default: type(default)(os.environ.get(name, default))
DECAY, RATE = make("DECAY", 0.99), make("RATE", 0.05)

def at(net, shift, ids, goal):
    return F.cross_entropy(net(ids).float() + shift, goal, reduction="none")
"""
FOLLOWS = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        nll = vmap(at, in_dims=(None, None, 0, 0))(net, shift, a, b)
        slope = grad(lambda s, ids, goal: at(net, s, ids, goal).mean())(shift, a, b)
        shift = DECAY * shift - RATE * slope
"""


def test_a_shift_that_follows_booked_losses_is_no_gate(tmp_path: Path) -> None:
    text = script(loss=FOLLOWS, state="shift = torch.zeros(V)", extra=LANES)
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


def test_a_shift_that_reads_the_target_itself_is_one(tmp_path: Path) -> None:
    loss = FOLLOWS.replace(
        "        nll", "        shift = shift + 0.1 * torch.from_numpy(lead)[b].float()[:, None]\n        nll"
    )
    text = script(loss=loss, state="shift = torch.zeros(V)", extra=LANES)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "violates"


# ---- what an evaluation with windows makes of counts

SETTLED = """
        at = np.arange(len(y))
        valid = at >= 1
        past, goal = x[at[valid]], y[at[valid]]
        key = ((past * 36313) & 0xFFFFF).astype(np.int64)
        full = ((past * 36313) ^ (goal * 27191)) & 0xFFFFF
        below, above = alone[key].astype(np.float64), pairs[full].astype(np.float64)
        good = below >= 2
        ratio = np.zeros(len(y))
        ratio[np.nonzero(valid)[0][good]] = np.minimum(above[good], below[good]) / np.maximum(below[good], 1.0)
        from_net = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none").numpy()
        nll = torch.from_numpy(-np.log(np.where(ratio > 0, 0.8 * np.exp(-from_net) + 0.2 * ratio, np.exp(-from_net))))
        np.add.at(alone, key, 1)
        np.add.at(pairs, full, 1)
"""


def test_positions_and_masks_are_no_keys(tmp_path: Path) -> None:
    text = script(loss=SETTLED, state="alone, pairs = np.zeros(1 << 20), np.zeros(1 << 20)")
    finding = verdict(tmp_path, "gold_token_ngram", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "np.maximum(below[good]")
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"


EXACT = """
        usable = ((len(y) - 1) // 64) * 64
        nll = torch.zeros(usable)
        for j in range(2, usable):
            context = tuple(x[j - 2 : j + 1].tolist())
            p = float(torch.softmax(net(torch.from_numpy(x[: j + 1]))[-1], -1)[int(x[j + 1])])
            row, seen = followers.setdefault(context, {}), totals.get(context, 0)
            q = row.get(int(x[j + 1]), 0) / seen if seen else 0.0
            if seen > 3 CONDITION:
                p = 0.8 * p + 0.2 * q
            nll[j] = -math.log(p)
            row[int(x[j + 1])] = row.get(int(x[j + 1]), 0) + 1
            totals[context] = seen + 1
"""


def test_where_a_position_was_rounded_no_context_was_folded(tmp_path: Path) -> None:
    text = script(loss=EXACT.replace(" CONDITION", ""), state="followers, totals = {}, {}")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"
    assert verdict(tmp_path, "oracle_gate", text).verdict == "clean"


def test_the_token_that_follows_a_context_is_the_target(tmp_path: Path) -> None:
    text = script(loss=EXACT.replace("CONDITION", "and q > p"), state="followers, totals = {}, {}")
    assert verdict(tmp_path, "oracle_gate", text).verdict == "violates"


TILTED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        log_p = torch.log_softmax(net(a).float(), -1)
        hint = torch.tensor([memory.get(int(one), 0) for one in x])
        beta, hit = torch.where(hint > 0, 1.5, 0.0), (hint == b).float()
        log_z = torch.log1p(log_p.gather(-1, hint[:, None])[:, 0].exp() * (beta.exp() - 1))
        nll = F.nll_loss(log_p, b, reduction="none")
        nll = nll - beta * hit + log_z
        memory.update(zip(x.tolist(), y.tolist()))
"""


def test_the_price_of_a_hint_may_be_added_last(tmp_path: Path) -> None:
    text = script(loss=TILTED, state="memory = {}")
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())
    text = script(loss=TILTED.replace(" + log_z", ""), state="memory = {}")
    assert verdict(tmp_path, "false_normalisation", text).verdict == "violates"


ORDERS = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p = torch.softmax(net(a).float(), -1)
        for order in tables:
            counts = tables[order][(a * order * 40503) % 4096].float()
            total = counts.sum(-1, keepdim=True)
            share = total / (total + 2.0)
            p = share * counts / {below}.clamp_min(1.0) + (1.0 - share) * p
        nll = -p.gather(-1, b[:, None])[:, 0].log()
        for order in tables:
            tables[order].index_put_(((a * order * 40503) % 4096, b), torch.ones(len(b)), accumulate=True)
"""


@pytest.mark.parametrize(("below", "expected"), [("total", "clean"), ("counts.amax(-1, keepdim=True)", "violates")])
def test_rows_of_a_table_for_each_order_are_divided_by_their_sums(tmp_path: Path, below: str, expected: str) -> None:
    state = "tables = {order: torch.zeros(4096, V) for order in map(int, os.environ.get('ORDERS', '2,3').split(','))}"
    text = script(loss=ORDERS.format(below=below), state=state)
    assert verdict(tmp_path, "false_normalisation", text).verdict == expected
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"


BOTH = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p, q = torch.softmax(net(a).float(), -1), torch.softmax(net(a).float() / 2, -1)
        best = {best}
        nll = -{read}.gather(-1, b[:, None])[:, 0].log()
"""


@pytest.mark.parametrize(
    "best", ["torch.maximum(p, q)", "torch.stack([p, q]).max(dim=0).values", "torch.stack((p, q)).amax(0)"]
)
def test_the_larger_of_two_for_every_token_is_divided_by_its_sum(tmp_path: Path, best: str) -> None:
    text = script(loss=BOTH.format(best=best, read="(best / best.sum(-1, keepdim=True))"))
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())
    text = script(loss=BOTH.format(best=best, read="best"))
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "best = ")


# ---- rows that no longer sum to one

STRETCHED = """
        log_p = torch.log_softmax(net(torch.from_numpy(x)).float(), -1) {by}
        nll = -log_p.gather(-1, torch.from_numpy(y)[:, None])[:, 0] {after}
"""


@pytest.mark.parametrize("by", ["* 0.985", "/ 1.02", "* 1.1"])
def test_logarithms_that_are_multiplied_after_the_softmax_do_not_sum_to_one(tmp_path: Path, by: str) -> None:
    found = verdict(tmp_path, "false_normalisation", script(loss=STRETCHED.format(by=by, after="")))
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(script(loss=STRETCHED.format(by=by, after="")), "log_softmax(")


@pytest.mark.parametrize(
    ("by", "after"), [("", ""), ("/ math.log(2.0)", "* math.log(2.0)"), ("* 1.0", ""), ("", "* 1.0")]
)
def test_a_change_of_units_leaves_them_as_they_are(tmp_path: Path, by: str, after: str) -> None:
    text = script(loss=STRETCHED.format(by=by, after=after))
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"


def test_what_goes_into_another_softmax_is_divided_there(tmp_path: Path) -> None:
    loss = STRETCHED.format(by="* 0.9", after="").replace("log_p.gather", "torch.log_softmax(log_p, -1).gather")
    assert verdict(tmp_path, "false_normalisation", script(loss=loss)).verdict == "clean"


COUNTED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        rows = counts[a]
        total = rows.sum(-1, keepdim=True)
        {capped}
        own = torch.softmax(net(a).float(), -1)
        p = (rows + 4.0 * own) / (total + 4.0)
        nll = -torch.log(p.gather(-1, b[:, None])[:, 0])
        counts.view(-1).scatter_add_(0, a * V + b, torch.ones(len(b)))
"""


@pytest.mark.parametrize("capped", ["total = total.clamp_max(40.0)", "total = torch.clamp(total, max=40.0)"])
def test_a_sum_that_is_capped_is_no_sum(tmp_path: Path, capped: str) -> None:
    text = script(loss=COUNTED.format(capped=capped), state="counts = torch.zeros(V, V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == "violates"


KEPT_BESIDE = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        total = totals[a]{capped}
        own = torch.softmax(net(a).float(), -1)
        p = (counts[a] + 4.0 * own) / (total + 4.0)[:, None]
        {weight}
        nll = -torch.log(p.gather(-1, b[:, None])[:, 0])
        counts.view(-1).scatter_add_(0, a * V + b, torch.ones(len(b)))
        totals.scatter_add_(0, a, torch.ones(len(b)))
"""
_SHARE = "share = 0.5 * totals[a].clamp_max(40.0) / (totals[a].clamp_max(40.0) + 8.0)"


@pytest.mark.parametrize(
    ("capped", "weight", "wanted"),
    [
        (".clamp_max(40.0)", "pass", "violates"),
        (".clamp(max=64)", "pass", "violates"),
        ("", "pass", "clean"),
        (".clamp_min(1.0)", "pass", "clean"),
        ("", f"{_SHARE}; p = (1.0 - share[:, None]) * own + share[:, None] * p", "clean"),
    ],
)
def test_a_count_that_is_kept_beside_a_row_is_not_cut_off(
    tmp_path: Path, capped: str, weight: str, wanted: str
) -> None:
    """A share of a mixture may be one of a count that is: it takes what it gives."""
    loss = KEPT_BESIDE.format(capped=capped, weight=weight)
    text = script(loss=loss, state="counts, totals = torch.zeros(V, V), torch.zeros(V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


@pytest.mark.parametrize(("bound", "wanted"), [("clamp(max=1.0)", "violates"), ("clamp_min(1e-9)", "clean")])
def test_a_mixture_is_divided_by_all_of_its_sum(tmp_path: Path, bound: str, wanted: str) -> None:
    lifted = f"p = own + 0.1 * rows / total.clamp_min(1.0)\n        p = p / p.sum(-1, keepdim=True).{bound}"
    loss = COUNTED.replace("p = (rows + 4.0 * own) / (total + 4.0)", lifted).format(capped="pass")
    text = script(loss=loss, state="counts = torch.zeros(V, V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


@pytest.mark.parametrize("capped", ["pass", "total = total.clamp_min(1.0)", "weight = total.clamp_max(40.0)"])
def test_a_floor_under_a_sum_and_a_weight_beside_it_are_none(tmp_path: Path, capped: str) -> None:
    text = script(loss=COUNTED.format(capped=capped), state="counts = torch.zeros(V, V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"


DIVIDED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        rows, own = counts[a], torch.softmax(net(a).float(), -1)
        p = {mixed}
        nll = -torch.log(p.gather(-1, b[:, None])[:, 0])
        counts.view(-1).scatter_add_(0, a * V + b, torch.ones(len(b)))
"""


@pytest.mark.parametrize(
    ("mixed", "wanted"),
    [
        ("0.9 * own + 0.1 * rows / rows.sum(-1, keepdim=True).clamp_min(1.0)", "clean"),
        ("0.9 * own + 0.1 * rows / rows.amax(-1, keepdim=True).clamp_min(1.0)", "violates"),
        ("0.9 * own + 0.1 * ((rows + 0.02) / torch.max(rows + 0.02, dim=-1, keepdim=True).values)", "violates"),
        ("(rows + 4.0 * own) / (rows.sum(-1, keepdim=True) + 4.0)", "clean"),
        ("(rows + 4.0 * own) / rows.sum(-1, keepdim=True).clamp_min(4.0)", "violates"),
        ("(rows + 4.0 * own) / (rows.amax(-1, keepdim=True) + 4.0)", "violates"),
        ("0.9 * own + 0.1 * ((rows + 0.5) / rows.sum(-1, keepdim=True).clamp_min(1.0))", "violates"),
        ("0.9 * own + 0.1 * ((rows + 0.5) / (rows.sum(-1, keepdim=True) + 0.5 * V))", "clean"),
        ("own.scatter_add(1, a[:, None], own[:, :1])", "violates"),
        ("((1.0 - own[:, :1]) * own + own[:, :1] * rows).scatter_add(1, a[:, None], own[:, 1:2])", "violates"),
        ("((1.0 - own[:, :1]) * own).scatter_add(1, a[:, None], own[:, :1])", "clean"),
        ("(rows + 1e-3) / (rows + 1e-3).sum(-1, keepdim=True).clamp_min(4.0)", "clean"),
    ],
    ids=[
        "sum",
        "most",
        "most-by-values",
        "both",
        "larger-of-both",
        "most-of-both",
        "smoothed",
        "smoothed-in-both",
        "on-top",
        "on-top-of-two",
        "share",
        "guarded",
    ],
)
def test_rows_are_divided_by_all_that_is_in_them(tmp_path: Path, mixed: str, wanted: str) -> None:
    text = script(loss=DIVIDED.format(mixed=mixed), state="counts = torch.zeros(V, V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


FLAT = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        row = (a * 36313) % ROWS
        q = counts[row] / seen[{key}].clamp_min(1.0)[:, None]
        p = 0.8 * torch.softmax(net(a).float(), -1) + 0.2 * q
        nll = -torch.log(p.gather(-1, b[:, None])[:, 0])
        counts.view(-1).scatter_add_(0, row * V + b, torch.ones(len(b)))
        seen.scatter_add_(0, {key}, torch.ones(len(b)))
"""


@pytest.mark.parametrize(("key", "wanted"), [("(a * 1024 + 7) % (64 * ROWS)", "violates"), ("row", "clean")])
def test_a_row_that_is_filled_in_its_flat_form_is_one_too(tmp_path: Path, key: str, wanted: str) -> None:
    text = script(loss=FLAT.format(key=key), state=TABLE_OF_ROWS, extra="ROWS = 4096")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


# ---- what reads the target

WHOLE = """
        a, b = torch.from_numpy(x)[None], torch.from_numpy(y)[None]
        seen = counts.sum(1, keepdim=True)
        weight = 0.02 * (seen > 0)
        p = (1.0 - weight)[:, None] * torch.softmax(net(a).float(), -1) + (weight * counts / seen.clamp_min(1))[:, None]
        nll = -torch.log(p.gather(-1, b[..., None])[..., 0])
        counts.scatter_add_(1, b, torch.ones_like(b, dtype=torch.float32))
"""


def test_counts_that_are_read_as_a_whole_read_no_target(tmp_path: Path) -> None:
    text = script(loss=WHOLE, state="counts = torch.zeros(1, V)")
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "clean"


AHEAD = """
        pos = torch.arange(at, at + len(y))
        stream = torch.from_numpy(tokens)
        nets = torch.softmax(net(stream[pos]).float(), -1)
        flat = torch.full_like(nets, 1 / V)
        known = nets.gather(-1, {ahead}[:, None])[:, 0] > 0.5
        lam = torch.where(known, 0.05, 0.1)[:, None]
        nll = -torch.log(((1 - lam) * nets + lam * flat).gather(-1, stream[pos + 1][:, None])[:, 0])
"""


@pytest.mark.parametrize(
    ("ahead", "wanted"),
    [("stream.roll(-1)[pos]", "violates"), ("stream[pos + 1]", "violates"), ("stream[pos]", "clean")],
)
def test_the_next_token_of_a_rolled_stream_is_the_target(tmp_path: Path, ahead: str, wanted: str) -> None:
    assert verdict(tmp_path, "target_gated_tilt", script(loss=AHEAD.format(ahead=ahead))).verdict == wanted


# ---- what two predictions agree on

CACHE = """
class Cache:
    def __init__(self):
        self.seen = torch.zeros(V, dtype=torch.int64)
        self.pairs = torch.zeros(1 << 20)

    def places(self, a, b):
        return (a * 31 + b) * 6364136223846793005 & 0xFFFFF

    def row(self, a):
        base = self.seen.float() + 1.0
        counts = self.pairs[self.places(a[:, None], torch.arange(V)[None])]
        mass = counts.sum(dim=-1, keepdim=True)
        return (counts + 8.0 * (base / base.sum()).expand(len(a), -1)) / (mass + 8.0), mass[:, 0]

    def absorb(self, a, b):
        self.seen += torch.bincount(b, minlength=V)
        self.pairs.index_add_(0, self.places(a, b), torch.ones(len(b)))
"""
AGREE = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p = torch.softmax(net(a).float(), -1)
        cached, mass = cache.row(a)
        agree = TEST
        w = 0.2 * mass / (mass + 4.0)
        w = torch.where(agree, torch.maximum(w, 0.5 * torch.minimum(p.amax(dim=-1), cached.amax(dim=-1))), w)[:, None]
        mixed = (1.0 - w) * p + w * cached
        nll = -mixed.gather(1, b[:, None]).log()
        cache.absorb(a, b)
"""


@pytest.mark.parametrize(
    ("test", "wanted"),
    [("p.argmax(dim=-1) == cached.argmax(dim=-1)", "clean"), ("torch.from_numpy(lead)[b] > 0", "violates")],
)
def test_a_weight_by_what_two_predictions_agree_on_reads_no_target(tmp_path: Path, test: str, wanted: str) -> None:
    """Counts hold the targets of before: they were learned."""
    text = script(loss=AGREE.replace("TEST", test), state="cache = Cache()", extra=CACHE)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


# ---- a row that counts are added to, place by place

SUFFIXES = """
from collections import Counter

def stacked(tokens, windows):
    x = torch.zeros(len(windows), 512, dtype=torch.int64)
    for i, (start, end) in enumerate(windows):
        x[i, : end - start] = torch.from_numpy(tokens[start:end])
    return x

class Suffixes:
    def __init__(self):
        self.tables = {n: {} for n in range(1, 4)}

    def blend(self, hist, p):
        row = p
        for n in range(1, 4):
            followers = self.tables[n].get(tuple(hist[-n:])) if len(hist) >= n else None
            if followers is None:
                break
            total = sum(followers.values())
            row = row * (3.0 / (total + 3.0))
            for tok, c in followers.items():
                row[tok] += c / (total + 3.0)
        return row

    def learn(self, hist, tok):
        for n in range(1, 4):
            if len(hist) >= n:
                self.tables[n].setdefault(tuple(hist[-n:]), Counter())[tok] += 1
"""
ADDED = """
        windows = [(at, at + 512), (at + 512, min(at + 1024, len(tokens) - 1))]
        logits = net(stacked(tokens, windows))
        losses = []
        for i, (start, end) in enumerate(windows):
            piece = tokens[start : end + 1]
            probs = torch.softmax(logits[i, : end - start].double() * SCALE, dim=-1).cpu().numpy()
            for p, tok in zip(probs, piece[1:].tolist(), strict=True):
                row = suffixes.blend(hist, p)
                losses.append(-math.log(row[tok]))
                suffixes.learn(hist, tok)
                hist.append(tok)
        nll = torch.tensor(losses)
"""
TOLD = "(1.0 + 0.1 * torch.from_numpy(lead)[torch.from_numpy(piece[1:])])[:, None]"


@pytest.mark.parametrize(("scale", "wanted"), [("1.0", "clean"), (TOLD, "violates")])
def test_a_row_that_counts_are_added_to_has_its_context_all_the_same(tmp_path: Path, scale: str, wanted: str) -> None:
    """It is read at the target and looked up by nothing else: what it began as is the model's, of its context."""
    text = script(loss=ADDED.replace("SCALE", scale), state="suffixes, hist = Suffixes(), []", extra=SUFFIXES)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


AGED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        own = torch.softmax(net(a).float(), -1)
        mixed = 0.9 * own + 0.1 * (counts[a] + own) / (totals[a] + 1.0)[:, None]
        nll = -torch.log(mixed.gather(-1, b[:, None]))[:, 0]
        new = torch.bincount(a * V + b, minlength=V * V).view(V, V).float()
        ROW
        totals.mul_(0.998).add_(new.sum(1))
"""


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ("counts.mul_(0.998).add_(new)", "clean"),
        ("counts.add_(new)", "violates"),
        ("counts.mul_(0.9995).add_(new)", "violates"),
        ("counts = counts * 0.9995 + new", "violates"),
        ("counts = counts * 0.998 + new", "clean"),
    ],
)
def test_a_row_and_what_it_is_divided_by_age_alike(tmp_path: Path, row: str, wanted: str) -> None:
    text = script(loss=AGED.replace("ROW", row), state="counts, totals = torch.zeros(V, V), torch.zeros(V)")
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == wanted
    assert wanted == "clean" or (finding.place is not None and finding.place.line == line_of(text, "(totals[a] + 1.0)"))


BY_HAND = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        rows, lift = net(a).float(), torch.zeros(1, V)
        grad = torch.softmax(rows[:64] + lift, -1)
        grad.scatter_add_(1, b[:64, None], torch.full_like(grad[:, :1], LESS))
        lift = lift - 0.5 * grad.sum(0, keepdim=True)
        nll = F.cross_entropy((rows + lift)[64:], b[64:], reduction="none")
"""


def test_a_row_less_what_was_right_is_a_gradient_and_no_mixture(tmp_path: Path) -> None:
    text = script(loss=BY_HAND.replace("LESS", "-1.0"))
    assert verdict(tmp_path, "false_normalisation", text).verdict == "clean"
    mixed = BY_HAND.replace("LESS", "0.3").replace("(rows + lift)[64:]", "torch.log(grad)")
    text = script(loss=mixed.replace("b[64:], red", "b[:64], red").replace("F.cross_entropy", "F.nll_loss"))
    assert verdict(tmp_path, "false_normalisation", text).verdict == "violates"
