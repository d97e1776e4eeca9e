"""Vectors that are fitted to windows, by a trial: what their own window, or any window of the batch, taught them."""

import numpy as np
import pytest

from fairway.audit.trial.arrays import Array, sum_of
from fairway.audit.trial.fitting import Fitting, runs
from fairway.audit.trial.sums import FITTED, SHARED, Sum
from tests.audit.order import broken
from tests.audit.test_rules_trials import HEAD

BATCHES = (
    HEAD
    + """
def evaluate(net, val, width=1024, stride=256, batch=BATCH):
    starts = [s for s in range(0, len(val) - 1, stride) if s == 0 or s + width - stride < len(val) - 1]
    nats, count = 0.0, 0
    for at in range(0, len(starts), batch):
        part = starts[at : at + batch]
        x = torch.zeros(len(part), width, dtype=torch.long)
        y = torch.zeros(len(part), width, dtype=torch.long)
        seen = torch.zeros(len(part), width)
        lengths = []
        for i, s in enumerate(part):
            e = min(s + width, len(val) - 1)
            x[i, : e - s], y[i, : e - s] = val[s:e], val[s + 1 : e + 1]
            lengths.append(e - s)
            seen[i, : 0 if s == 0 else REACH] = 1.0 / width
        hid = net.table(x).detach()
        shift = MADE
        for _ in range(3):
            lg = F.linear(hid + shift, net.table.weight)
            nll = F.cross_entropy(lg.flatten(0, 1), y.flatten(), reduction="none").view(len(part), width)
            shift.grad = torch.autograd.grad((nll * seen).sum(), shift)[0]
            shift.data -= 0.1 * shift.grad
        lg = F.linear(hid + shift.detach(), net.table.weight)
        nll = F.cross_entropy(lg.flatten(0, 1), y.flatten(), reduction="none").view(len(part), width)
        for i, s in enumerate(part):
            first = 0 if s == 0 else width - stride
            nats += nll[i, first : lengths[i]].sum().item()
            count += lengths[i] - first
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


MADE = (
    "torch.zeros(ROWS, 1, hid.size(-1), requires_grad=True)",
    "torch.zeros(ROWS, 1, 64).requires_grad_(True)",
    "torch.zeros(ROWS, 1, hid.size(-1)).requires_grad_()",
)


def written(rows: str = "len(part)", reach: str = "width - stride", batch: int = 8, made: str = MADE[0]) -> str:
    return BATCHES.replace("MADE", made).replace("ROWS", rows).replace("REACH", reach).replace("BATCH", str(batch))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (written(made=MADE[0]), set()),
        (written(made=MADE[1]), set()),
        (written(made=MADE[2]), set()),
        (written(rows="1", batch=1), set()),  # one row for one window is nothing that is shared
        (written(reach="width"), {"slot-on-scored"}),
        (written(reach="width - stride + 64"), {"slot-on-scored"}),
        (written(rows="1"), {"slot-shared-delta"}),
    ],
)
def test_a_context_that_is_written_down_row_by_row_is_told_from_what_is_scored(text: str, found: set[str]) -> None:
    assert broken(text) & {"slot-on-scored", "slot-shared-delta"} == found


@pytest.mark.parametrize(
    ("reach", "found"),
    [("width - 2 * stride", {"twice-counted-tokens"}), ("width", {"twice-counted-tokens", "slot-on-scored"})],
)
def test_targets_that_count_twice_are_no_vectors_that_were_fitted_to_them(reach: str, found: set[str]) -> None:
    text = written(reach=reach).replace("else width - stride\n", "else width - 2 * stride\n")
    assert broken(text) & {"twice-counted-tokens", "slot-on-scored", "slot-shared-delta"} == found


def test_a_model_that_learns_beside_the_vectors_is_not_charged_with_what_they_learned() -> None:
    """Both kinds of steps stand in one function, and a context was scored before."""
    learn = """
        opt = torch.optim.SGD(net.parameters(), lr=1e-3)
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        opt.step()
    return nats / count
"""
    assert broken(written().replace("    return nats / count\n", learn.removeprefix("\n"))) == set()


CLOSED = (
    HEAD
    + """
def evaluate(net, val, chunk=512):
    notes = torch.optim.SGD(net.parameters(), lr=1e-3)
    nats = 0.0
    for at in range(0, len(val) - 1, chunk):
        x, y = val[at : at + chunk], val[at + 1 : at + chunk + 1]
        said = net(x)
        shift = torch.zeros(1024, requires_grad=True)
        fit = torch.optim.LBFGS([shift], max_iter=4)

        def closure():
            fit.zero_grad()
            value = F.cross_entropy(said.detach() + shift, GOALS)
            value.backward()
            return value

        fit.step(closure)
        price = F.cross_entropy(said + shift.detach(), y, reduction="none")
        nats += price.detach().sum().item()
        price.mean().backward()
        notes.step()
    return nats / (len(val) - 1)

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


def test_a_vector_that_learns_by_a_closure_is_not_cleared_by_a_model_that_learns_afterwards() -> None:
    """Without the closure's lesson the trial would see only steps that follow the losses."""
    assert "slot-on-scored" in broken(CLOSED.replace("GOALS", "y"))


PLANNED = (
    HEAD.replace("import glob, math", "import glob, math, typing")
    + """
class Window(typing.NamedTuple):
    start: int
    end: int
    fresh: int

def plan(total, width=1024, stride=256):
    context = width - stride
    return [Window(s, min(s + width, total), 0 if s == 0 else context)
            for s in range(0, total, stride) if s == 0 or s + context < total]

def batched(planned, size):
    batch = []
    for w in planned:
        if batch and (len(batch) == size or w.fresh != batch[0].fresh):
            yield batch
            batch = []
        batch.append(w)
    yield batch

def fit(net, hid, goals):
    delta = torch.zeros(ROWS, 1, hid.size(-1))
    m = torch.zeros_like(delta)
    for _ in range(2):
        delta.requires_grad_(True)
        lg = F.linear(hid + delta, net.table.weight)
        nll = F.cross_entropy(lg.flatten(0, 1), goals.flatten(), reduction="none").view(goals.shape)
        (grad,) = torch.autograd.grad(nll.mean(dim=1).sum(), delta)
        m.mul_(0.9).add_(grad, alpha=0.1)
        delta = delta.detach() - 0.1 * m
    return delta

def evaluate(net, val):
    nats, count = 0.0, 0
    for batch in batched(plan(len(val) - 1), BATCH):
        x, y = torch.zeros(len(batch), 1024, dtype=torch.long), torch.zeros(len(batch), 1024, dtype=torch.long)
        for i, w in enumerate(batch):
            x[i, : w.end - w.start], y[i, : w.end - w.start] = val[w.start : w.end], val[w.start + 1 : w.end + 1]
        fresh = batch[0].fresh
        hid = net.table(x).detach()
        seen = slice(max(0, fresh + MORE - 512), fresh + MORE)
        delta = fit(net, hid[:, seen], y[:, seen])
        lg = F.linear(hid[:, fresh:] + delta, net.table.weight)
        nll = F.cross_entropy(lg.flatten(0, 1), y[:, fresh:].flatten(), reduction="none").view(len(batch), -1)
        for i, w in enumerate(batch):
            many = w.end - w.start - fresh
            nats += nll[i, :many].sum().item()
            count += many
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


@pytest.mark.parametrize(
    ("rows", "more", "batch", "found"),
    [
        ("hid.size(0)", "0", "8", set()),
        ("hid.size(0)", "1", "8", {"slot-on-scored"}),
        ("1", "0", "8", {"slot-shared-delta"}),
        ("1", "0", "1", set()),
    ],
    ids=["its own context", "one position too far", "one for all", "one for one"],
)
def test_what_the_walk_sees_nothing_of_is_counted(rows: str, more: str, batch: str, found: set[str]) -> None:
    """Windows are planned as tuples and fitted by a moment of the script's own: the walk sees no step at all."""
    text = PLANNED.replace("ROWS", rows).replace("MORE", more).replace("BATCH", batch)
    assert broken(text) & {"slot-on-scored", "slot-shared-delta"} == found


def windows(starts: list[int], width: int = 8, weights: tuple[int, int] = (0, 8)) -> Array:
    """The losses of windows of the text, of which those from one place to another weigh one."""
    places = np.array([range(start, start + width) for start in starts], np.int32)
    coef = np.zeros(places.shape)
    coef[:, slice(*weights)] = 1.0
    return Array(None, places, coef)


def test_a_vector_of_its_own_and_one_for_all_are_marked_apart() -> None:
    fitting = Fitting()
    batch = windows([0, 4, 8], weights=(0, 4))
    fitting.learn(sum_of(batch))
    assert batch.pos is not None
    marks = fitting.marks(batch.pos, batch.pos.shape)
    own = [[True] * 4 + [False] * 4] * 3
    anybody = [[True] * 8] * 2 + [[True] * 4 + [False] * 4]
    assert ((marks & FITTED) != 0).tolist() == own
    assert ((marks & SHARED) != 0).tolist() == anybody
    fitting.made_anew()
    assert not fitting.marks(batch.pos, batch.pos.shape).any()


def test_a_window_without_a_context_has_learned_nothing_from_the_others() -> None:
    fitting = Fitting()
    batch = windows([0, 4], weights=(0, 4))
    assert batch.pos is not None
    assert batch.coef is not None
    batch.coef[0] = 0.0
    fitting.learn(sum_of(batch))
    assert not (fitting.marks(batch.pos, batch.pos.shape)[0] & FITTED).any()


def test_a_window_that_nobody_can_tell_has_learned_what_any_has() -> None:
    fitting = Fitting()
    fitting.learn(sum_of(windows([0, 4])))
    later = windows([6], width=4).pos
    assert later is not None
    assert (fitting.marks(later, later.shape) & FITTED != 0).all()


def test_what_is_learned_from_losses_of_nobodys_window_is_every_windows() -> None:
    fitting = Fitting()
    batch = windows([0, 4], weights=(0, 4))
    fitting.learn(sum_of(batch))
    assert batch.pos is not None
    assert batch.coef is not None
    fitting.learn(sum_of(Array(None, batch.pos.reshape(-1)[[6, 1]], np.ones(2))))
    assert (fitting.marks(batch.pos, batch.pos.shape) & FITTED != 0)[0].tolist() == [True] * 4 + [
        False,
        False,
        True,
        False,
    ]


def test_windows_are_where_places_go_on_one_by_one() -> None:
    flat = np.array([3, 4, 5, 9, 10, -1, 2], np.int32)
    assert [(each.start, each.stop) for each in runs(flat)] == [(0, 3), (3, 5), (6, 7)]
    assert runs(np.arange(400, dtype=np.int32)[::-1]) == []
    assert [(each.start, each.stop) for each in runs(np.arange(24, dtype=np.int32), 12)] == [(0, 12), (12, 24)]


def test_rows_of_padding_are_no_windows() -> None:
    padded = np.array([*range(3, 9), -1, -1, -1, -1, *range(7, 13), -1, -1, -1, -1], np.int32)
    assert [(each.start, each.stop) for each in runs(padded, 10)] == [(0, 6), (10, 16)]
    fitting = Fitting()
    places = np.stack([np.arange(3, 11), np.full(8, -1)]).astype(np.int32)
    fitting.learn(sum_of(Array(None, places, np.ones(places.shape))))
    assert len(fitting.listed) == 1


@pytest.mark.parametrize(("reach", "found"), [(0, False), (1, True), (3, True)])
def test_what_follows_on_without_a_gap_is_told_by_how_far_each_window_has_learned(reach: int, found: bool) -> None:
    """Four windows of 16 that move on by 4 are asked for their last 4, as 16 places in a row."""
    fitting = Fitting()
    fitting.learn(sum_of(windows([0, 4, 8, 12], width=16, weights=(0, 12 + reach))))
    scored = np.arange(12, 28, dtype=np.int32)
    assert bool((fitting.marks(scored, (16, 1)) & FITTED).any()) == found


def test_a_window_that_is_asked_for_all_it_has_is_no_row_of_tiles() -> None:
    fitting = Fitting()
    fitting.learn(sum_of(windows([0, 4, 8, 12], width=16, weights=(0, 12))))
    whole = np.arange(0, 16, dtype=np.int32)
    assert (fitting.marks(whole, (16,)) & FITTED != 0).tolist() == [True] * 12 + [False] * 4


def test_windows_that_begin_at_the_same_place_are_told_by_their_order() -> None:
    """The first windows of a chunk all begin where it does, and each is scored on four more; a later window begins
    where an earlier one is scored."""
    fitting = Fitting()
    places = np.array([range(16)] * 3 + [range(4, 20)], np.int32)
    learned = np.array([[n < many for n in range(16)] for many in (4, 8, 12, 12)], np.float64)
    fitting.learn(sum_of(Array(None, places, learned)))
    fitting.learn(sum_of(Array(None, places, learned)))
    scored = np.array([range(low, low + 4) for low in (4, 8, 12, 16)], np.int32)
    assert not (fitting.marks(scored, scored.shape) & FITTED).any()
    too_far = np.array([range(low, low + 4) for low in (3, 7, 11, 15)], np.int32)
    assert (fitting.marks(too_far, too_far.shape) & FITTED != 0).tolist() == [[True, False, False, False]] * 4


@pytest.mark.parametrize("flat", [False, True], ids=["row by row", "without a gap"])
def test_a_window_without_a_context_is_the_first_of_those_that_begin_where_it_does(flat: bool) -> None:
    """All of its targets are left out, so that nothing tells where it begins."""
    fitting = Fitting()
    many = [0, 4, 8, 12]
    losses = [Array(None, np.arange(each, dtype=np.int32), np.ones(each)) for each in many]
    fitting.learn(Sum(parts=tuple((sum_of(each), 1.0) for each in losses)))
    scored = np.arange(16, dtype=np.int32) if flat else np.arange(16, dtype=np.int32).reshape(4, 4)
    assert not (fitting.marks(scored, scored.shape) & FITTED).any()


PICKED = (
    BATCHES[: BATCHES.index("        lg = F.linear(hid + shift.detach()")]
    + """        rows, cols = [], []
        for i, s in enumerate(part):
            first = 0 if s == 0 else width - stride
            cols.append(torch.arange(first, lengths[i]))
            rows.append(torch.full_like(cols[-1], i))
        rows, cols = torch.cat(rows), torch.cat(cols)
        lg = F.linear((hid + shift.detach())[rows, cols], net.table.weight) / 1.05
        nll = -torch.log_softmax(lg, -1).gather(1, y[rows, cols].unsqueeze(1)).squeeze(1)
        nats += nll.sum().item()
        count += nll.numel()
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


@pytest.mark.parametrize(
    ("reach", "found"),
    [("width - stride", False), ("width - stride + 1", True)],
    ids=["its own context", "one too far"],
)
def test_what_is_picked_out_of_all_windows_at_once_has_its_own_vector_still(reach: str, found: bool) -> None:
    """A mask as weights of flat losses, and a temperature beside the vector, which is none."""
    text = PICKED.replace("MADE", MADE[0]).replace("ROWS", "hid.size(0)").replace("REACH", reach).replace("BATCH", "8")
    charged = broken(text) & {"slot-on-scored", "slot-shared-delta", "temperature-from-validation"}
    assert bool(charged) == found


FILLED = BATCHES.replace(
    "        hid = net.table(x)",
    "        if len(part) < batch:  # copies of the last window, which learn from all of it and are not scored\n"
    "            more = batch - len(part)\n"
    "            x = torch.cat([x, x[-1:].expand(more, -1)])\n"
    "            y = torch.cat([y, y[-1:].expand(more, -1)])\n"
    "            seen = torch.cat([seen, torch.full((more, width), 1.0 / width)])\n"
    "        hid = net.table(x)",
).replace(".view(len(part), width)", ".view(batch, width)")


@pytest.mark.parametrize(("reach", "found"), [("width - stride", set()), ("width - stride + 1", {"slot-on-scored"})])
def test_copies_that_fill_up_the_last_batch_are_no_fault(reach: str, found: set[str]) -> None:
    text = FILLED.replace("MADE", MADE[0]).replace("ROWS", "batch").replace("REACH", reach).replace("BATCH", "12")
    assert broken(text) & {"slot-on-scored", "slot-shared-delta"} == found


def test_a_context_that_is_gathered_backwards_is_one_window() -> None:
    """`lo - 1 - arange(reach)`, clamped: places that weigh nought stand at its end, again and again."""
    found = sum_of(Array(None, np.asarray([9, 8, 7, 7, 7]), np.asarray([0.5, 0.5, 0.5, 0.0, 0.0])))
    assert found.rows is not None
    assert (found.rows.starts.tolist(), found.rows.counts.tolist()) == ([7], [3])
    apart = sum_of(Array(None, np.asarray([9, 8, 6]), np.ones(3)))
    assert apart.rows is None


def test_a_window_of_nothing_but_places_that_weigh_nought_is_the_first() -> None:
    """Its vector has learned nothing, and the scored parts follow on without a gap, 64 places each."""
    fitting = Fitting()
    fitting.made_anew()
    nothing = sum_of(Array(None, np.asarray([0, 0, 0]), np.zeros(3)))
    others = [sum_of(Array(None, np.arange(low, low + 64)[::-1], np.ones(64))) for low in (0, 64)]
    fitting.learn(nothing + others[0] + others[1])
    assert fitting.blank == 1
    marks = fitting.marks(np.arange(192), (192, 1))
    assert not (marks & FITTED).any()


HELD = (
    HEAD
    + """
class Shifts:
    def __init__(self, rows, width):
        self.delta = torch.zeros(rows, 1, width, requires_grad=True)
        self.opt = torch.optim.AdamW([self.delta], lr=0.01)

    def move(self):
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)

class Scorer:
    def __init__(self, net):
        self.net = net
        self._objective = torch.compile(self._fit_loss, dynamic=False)
        self._losses = torch.compile(self._token_losses, dynamic=False)

    def _token_losses(self, h, y, delta):
        lg = F.linear(h + delta, self.net.table.weight)
        return F.cross_entropy(lg.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

    def _fit_loss(self, h, y, weight, delta):
        return ((self._token_losses(h, y, delta) * weight).sum(1) / weight.sum(1).clamp_min(1.0)).sum()

    def fit(self, h, y, weight):
        shifts = Shifts(h.size(0), 64)
        for step in range(4):
            loss = self._objective(h, y, weight, shifts.delta)
            loss.backward()
            shifts.move()
        return shifts

def plan(total, width, stride):
    start = np.arange(0, total, stride, dtype=np.int64)
    stop = np.minimum(start + stride, total)
    return np.stack((np.maximum(stop - width, 0), start, stop), axis=1)

def evaluate(net, val, width=1024, stride=256, batch=8):
    scorer, nats = Scorer(net), torch.zeros((), dtype=torch.float64)
    rows = plan(len(val) - 1, width, stride)
    for at in range(0, len(rows), batch):
        edges = torch.from_numpy(rows[at : at + batch])
        left, start, stop = edges[:, 0:1], edges[:, 1:2], edges[:, 2:3]
        pos = left + torch.arange(width)[None, :]
        inside = pos < stop
        place = torch.where(inside, pos, torch.zeros_like(pos))
        x, y = val[place].long(), val[place + 1].long()
        fit = inside & (pos < start + AHEAD)
        h = net.table(x).detach()
        shifts = scorer.fit(h, y, fit.float())
        nats += scorer._losses(h, y, shifts.delta)[inside & (pos >= start)].double().sum()
    return (nats / (len(val) - 1)).item()

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


@pytest.mark.parametrize(("ahead", "found"), [("0", set()), ("64", {"slot-on-scored"})])
def test_vectors_whose_step_stands_in_a_helper_of_their_own(ahead: str, found: set[str]) -> None:
    """Compiled methods of what is no model, gradients asked for in one place, the step taken in another."""
    assert broken(HELD.replace("AHEAD", ahead)) & {"slot-on-scored", "slot-shared-delta"} == found


@pytest.mark.parametrize(("reach", "found"), [(0, False), (2, True)])
def test_windows_of_uneven_ends_are_told_by_what_each_is_asked_for(reach: int, found: bool) -> None:
    """Picked out of a batch at once: two windows of one document, the last one short, and two of the next, of which the
    first has no context."""
    fitting = Fitting()
    places = np.array([range(16), range(4, 20), range(32, 48), range(35, 51)], np.int32)
    ends = (12, 13, 0, 10)
    learned = np.array([[n < end + (reach if end else 0) for n in range(16)] for end in ends], np.float64)
    fitting.learn(sum_of(Array(None, places, learned)))
    scored = np.array([*range(12, 20), *range(32, 51)], np.int32)
    assert bool((fitting.marks(scored, (27, 1)) & FITTED).any()) == found


LAID = (
    HEAD
    + """
def evaluate(net, val, width=512, stride=64, batch=600):
    F.cross_entropy(net(val[:64]), val[1:65]).item()  # compiled
    nats, count = 0.0, 0
    blocks = [(s, min(s + stride, len(val))) for s in range(1, len(val), stride)]
    for at in range(0, len(blocks), batch):
        rows, cols, places, old_rows, old_cols, old = [], [], [], [], [], []
        part = blocks[at : at + batch]
        x = torch.zeros(len(part), width, dtype=torch.long)
        for i, (s, e) in enumerate(part):
            start = max(0, e - 1 - width)
            x[i, : e - 1 - start] = val[start : e - 1]
            own = np.arange(s, e)
            past = np.arange(max(start + 1, s - 128), s + AHEAD)
            rows.append(np.full(own.size, i))
            cols.append(own - 1 - start)
            places.append(own)
            old_rows.append(np.full(past.size, i))
            old_cols.append(past - 1 - start)
            old.append(past)
        hid = net.table(x).detach()
        lead = torch.zeros(ROWS, hid.size(-1), requires_grad=True)
        ro, co = torch.from_numpy(np.concatenate(old_rows)), torch.from_numpy(np.concatenate(old_cols))
        seen = np.concatenate(old)
        opt = torch.optim.AdamW([lead], lr=0.004)
        for _ in range(4):
            opt.zero_grad()
            F.cross_entropy(net.head(hid[ro, co] + lead[PICK]), val[torch.from_numpy(seen)], reduction="sum").backward()
            opt.step()
        r, c = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(cols))
        said = net.head(hid[r, c] + lead.detach()[OWN])
        price = F.cross_entropy(said, val[torch.from_numpy(np.concatenate(places))], reduction="none")
        nats += price.sum().item()
        count += price.numel()
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


@pytest.mark.parametrize(
    ("ahead", "rows", "found"),
    [("0", "len(part)", False), ("32", "len(part)", True), ("e - s", "len(part)", True), ("0", "1", True)],
    ids=["the context alone", "half of what is scored", "all of what is scored", "one vector for all"],
)
def test_contexts_that_are_laid_end_to_end_are_told_by_where_the_text_goes_on(
    ahead: str, rows: str, found: bool
) -> None:
    """More than five hundred windows at once, the first of them without a context."""
    pick, own = ("ro", "r") if rows != "1" else ("ro * 0", "r * 0")
    text = LAID.replace("AHEAD", ahead).replace("ROWS", rows).replace("PICK", pick).replace("OWN", own)
    assert bool(broken(text) & {"slot-on-scored", "slot-shared-delta"}) is found


@pytest.mark.parametrize(("reach", "found"), [("<", False), ("<= 64 +", True)])
def test_a_vector_that_is_fitted_to_every_eighth_place_of_a_context(reach: str, found: bool) -> None:
    """The places of each window are told by a tensor, and every eighth is asked for."""
    text = (
        HEAD
        + """
def fit(net, hid, x, offset):
    past, want = hid[:, :-1].detach(), x[:, 1:]
    seen = torch.arange(want.size(1))[None, :] REACH offset[:, :1]
    shift = torch.zeros(hid.size(0), 1, past.size(-1), requires_grad=True)
    for _ in range(4):
        said = net.head(past[:, ::8] + shift)
        each = F.cross_entropy(said.flatten(0, 1), want[:, ::8].flatten(), reduction="none")
        row = (each.view(hid.size(0), -1) * seen[:, ::8]).sum(1) / seen[:, ::8].sum(1).clamp_min(1)
        (slope,) = torch.autograd.grad(row.sum(), [shift])
        shift = (shift - 0.05 * slope).detach().requires_grad_(True)
    return shift.detach()

def evaluate(net, val, width=512, stride=64, batch=32):
    last, nats, count = val.numel() - 1, 0.0, 0
    blocks = (last + stride - 1) // stride
    for at in range(0, blocks, batch):
        some = torch.arange(at, min(at + batch, blocks))
        first = some * stride
        begin = (first + stride - width).clamp_min(0)
        place = begin[:, None] + torch.arange(width)[None, :]
        x = val[place.clamp_max(last)]
        target = first[:, None] + 1 + torch.arange(stride)[None, :]
        offset = target - 1 - begin[:, None]
        here = target <= last
        hid = net.table(x)
        hid = hid + fit(net, hid, x, offset)
        hid = hid.gather(1, offset[:, :, None].expand(-1, -1, hid.size(-1)))
        price = F.cross_entropy(net.head(hid).flatten(0, 1), val[target.clamp_max(last)].flatten(), reduction="none")
        price = price.view(target.shape)[here]
        nats += price.sum().item()
        count += price.numel()
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
    ).replace("REACH", reach)
    assert bool(broken(text) & {"slot-on-scored", "slot-shared-delta"}) is found


MASKED = (
    HEAD
    + """
def evaluate(net, val, width=1024, stride=64, batch=16):
    total = len(val) - 1
    spans = [(max(0, end - width), end - stride, end) for end in range(stride, total + 1, stride)]
    nats, count = 0.0, 0
    for at in range(0, len(spans), batch):
        bounds = torch.tensor(spans[at : at + batch])
        pos = bounds[:, :1] + torch.arange(width)
        first = bounds[:, 1:2]
        inside = (pos >= first) & (pos < bounds[:, 2:])
        hid = net.table(val[pos]).detach()
        shift = torch.zeros(hid.size(0), 1, 64, requires_grad=True)
        context = (pos < first AHEAD) & (pos >= first - 64)
        window = context.nonzero()[:, 0]
        if len(window):
            lg = F.linear(hid[context] + shift[window, 0], net.table.weight)
            after = val[pos[context] + 1].long()
            shift.grad = torch.autograd.grad(F.cross_entropy(lg, after, reduction="sum"), shift)[0]
            shift.data -= 0.1 * shift.grad
        lg = F.linear((hid + shift.detach())[inside], net.table.weight)
        nats += F.cross_entropy(lg, val[pos[inside] + 1], reduction="sum").item()
        count += int(inside.sum())
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
)


@pytest.mark.parametrize(("ahead", "found"), [("", set()), ("+ 8", {"slot-on-scored"})])
def test_contexts_that_a_mask_picks_are_told_by_the_rows_that_they_come_from(ahead: str, found: set[str]) -> None:
    """They are as long as what is scored, so that they lie end to end, and so does what is scored."""
    assert broken(MASKED.replace("AHEAD", ahead)) == found


BLOCKS = BATCHES.replace(
    "            seen[i, : 0 if s == 0 else REACH] = 1.0 / width\n",
    "            rows += [i] * (lengths[i] - (0 if s == 0 else width - stride))\n"
    "            cols += range(0 if s == 0 else width - stride, lengths[i])\n",
).replace("        lengths = []\n", "        lengths, rows, cols = [], [], []\n")
BLOCKS = BLOCKS.replace(
    "        shift = MADE\n",
    "        begin = torch.full((len(part),), width).scatter_reduce(\n"
    "            0, torch.tensor(rows), torch.tensor(cols), reduce='amin')\n"
    "        seen = (torch.arange(width)[None, :] < begin[:, None] AHEAD).float() / width\n"
    "        shift = MADE\n",
)


@pytest.mark.parametrize(("ahead", "found"), [("", set()), ("+ 1", {"slot-on-scored"})])
def test_where_a_block_begins_is_found_by_the_least_of_its_columns(ahead: str, found: set[str]) -> None:
    text = BLOCKS.replace("MADE", MADE[0]).replace("ROWS", "len(part)").replace("BATCH", "8")
    assert broken(text.replace("AHEAD", ahead)) == found
