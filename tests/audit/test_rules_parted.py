"""Tables that every process fills with what lies before its own part of the text, and shares that begin too early."""

import pytest

from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.parted import of_earlier_parts
from fairway.audit.rules import twice_counted_tokens, two_pass_cache
from tests.audit.order import HEAD, MAIN, broken, case_of, doubted, findings, line_of

PARTED = """
class Counts:
    def __init__(self):
        self.rows = torch.zeros(1024, 1024)
        self.first = PRIOR
    def absorb(self, val, lo, hi):
        a, b = val[lo:hi], val[lo + 1 : hi + 1]
        self.rows.index_put_((a, b), torch.ones(len(a)), accumulate=True)
    def fill(self, val, lo, hi):
        for at in range(lo, hi, 4096):
            self.absorb(val, at, min(at + 4096, hi))

class Scorer:
    def __init__(self, args, model):
        self.model, self.counts = model, Counts()
    def score(self, val, lo, hi, sums):
        x, y = val[lo:hi], val[lo + 1 : hi + 1]
        p = torch.softmax(self.model.forward_logits(x[None])[0], -1)
        rows = self.counts.rows[x] + self.counts.first
        mixed = 0.9 * p + 0.1 * rows / rows.sum(-1, keepdim=True)
        sums[0] += -mixed.gather(1, y[:, None]).log().double().sum()
        sums[1] += len(y)

def span_of(total, rank, size):
    strides = math.ceil(total / 64)
    return min(strides * rank // size * 64, total), min(strides * (rank + 1) // size * 64, total)

def pieces(first, last):
    for lo in range(first, last, 1024):
        yield lo, min(lo + 1024, last)

def ev(args, model, val):
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    total = val.numel() - 1
    first, last = span_of(total, rank, size)
    scorer, sums = Scorer(args, model), torch.zeros(2, dtype=torch.float64)
    scorer.counts.fill(val, FILLED)
    for lo, hi in pieces(first, last):
        scorer.score(val, lo, hi, sums)
        scorer.counts.absorb(val, lo, hi)
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
"""
KNOWN, UNKNOWN = "1.0", 'torch.from_numpy(np.load("prior.npy"))'


def script(filled: str, prior: str) -> str:
    text = PARTED.replace("FILLED", filled).replace("PRIOR", prior)
    return HEAD + text + MAIN.replace("eval_ttt(args, model, val)", "ev(args, model, val)")


@pytest.mark.parametrize("prior", [KNOWN, UNKNOWN])
def test_what_lies_before_a_ranks_own_part_may_be_counted_first(prior: str) -> None:
    """Other ranks score it; where no price can be weighed, a trial of the second of two processes says so."""
    assert doubted(script("0, first", prior)) == set()


def test_parts_may_go_to_ranks_in_reverse() -> None:
    """The first of two processes scores the second part, and the second one fills nothing."""
    text = script("0, first", UNKNOWN).replace(
        "span_of(total, rank, size)\n    scorer", "span_of(total, size - 1 - rank, size)\n    scorer"
    )
    assert "size - 1 - rank" in text
    assert doubted(text) == set()
    assert "two-pass-cache" in broken(text.replace("fill(val, 0, first)", "fill(val, 0, last)"))


HELPED = """
    def mixed(self, logp, x):
        rows = self.counts.rows[x] + self.counts.first
        shares = rows / rows.sum(-1, keepdim=True)
        return torch.logaddexp(logp + math.log(0.9), shares.log() + math.log(0.1))
    def score(self, val, lo, hi, sums):
        x, y = val[lo:hi], val[lo + 1 : hi + 1]
        logp = torch.log_softmax(self.model.forward_logits(x[None])[0], -1)
        nll = -self.mixed(logp, x).gather(1, y[:, None])
        sums[0] += nll.double().sum()
        sums[1] += len(y)
"""


def test_a_helper_may_make_the_prices_that_its_caller_sums() -> None:
    """The line that sums is none of those that lead to where the loss is made (ronay)."""
    own = PARTED[PARTED.index("    def score(self") : PARTED.index("\ndef span_of")]
    text = script("0, first", UNKNOWN)
    assert own in text
    text = text.replace(own, HELPED[1:])
    assert doubted(text) == set()
    case, fill = case_of(text), line_of(text, "scorer.counts.fill(")
    made = next(each for each in case.trace.scores if each.place.line == line_of(text, "return torch.logaddexp"))
    filled = next(each for each in case.trace.updates if any(place.line == fill for place in each.stack))
    assert of_earlier_parts(case, made, filled)


@pytest.mark.parametrize("filled", ["last, total", "0, last", "0, total"])
@pytest.mark.parametrize("prior", [KNOWN, UNKNOWN])
def test_what_lies_behind_it_may_not(filled: str, prior: str) -> None:
    """Nor may the part itself. The first process alone fills nothing behind it: there is nothing."""
    assert "two-pass-cache" in broken(script(filled, prior))


def test_what_else_is_scored_with_it_is_asked_for_itself() -> None:
    """The parts before it are scored by other ranks, and not again with a table that holds them."""
    own = "    torch.distributed.all_reduce(sums)\n"
    again = "    for lo, hi in pieces(0, first):\n        scorer.score(val, lo, hi, sums)\n"
    text = script("0, first", UNKNOWN).replace(own, again + own)
    assert "two-pass-cache" in broken(text)
    filled = {place.line for fault in passes_of(case_of(text))[1] for place in fault.cause.stack}
    assert line_of(text, "scorer.counts.fill(") in filled


def filled_at(text: str) -> int:
    found = two_pass_cache.check(case_of(text))
    assert found.verdict == "violates"
    assert found.place is not None
    return found.place.line


def test_who_says_how_much_is_filled_is_named() -> None:
    """Not the loop of the helper that is told from where to where."""
    text = script("0, total", UNKNOWN)
    assert filled_at(text) == line_of(text, "scorer.counts.fill(val, 0, total)")
    own = "    def score(self"
    ready = "    def ready(self, first):\n        self.counts.fill(self.val, 0, self.total)\n"
    text = text.replace(
        "scorer.counts.fill(val, 0, total)", "scorer.val, scorer.total = val, total\n    scorer.ready(first)"
    )
    text = text.replace(own, ready + own)
    assert filled_at(text) == line_of(text, "self.counts.fill(self.val, 0, self.total)")
    text = text.replace("range(lo, hi, 4096)", "range(0, LIMIT, 4096)").replace(
        "class Counts", "LIMIT = 60_000_000\nclass Counts"
    )
    assert filled_at(text) == line_of(text, "self.absorb(val, at, min(")


def test_a_loop_over_orders_does_not_say_how_much_of_the_text_is_filled() -> None:
    text = script("0, total", UNKNOWN)
    text = text.replace(
        "        self.first = ",
        "        self.orders = list(range(int(os.environ['LOW']), 4))\n        self.first = ",
        1,
    )
    text = text.replace("for at in range(lo, hi, 4096):", "for order in self.orders:")
    put = "self.rows.index_put_((a, b), torch.ones(len(a)), accumulate=True)"
    for_order = f"a, b = val[max(lo, order) : hi], val[max(lo, order) + 1 : hi + 1]\n            {put}"
    text = text.replace("self.absorb(val, at, min(at + 4096, hi))", for_order)
    assert filled_at(text) == line_of(text, "scorer.counts.fill(val, 0, total)")


@pytest.mark.parametrize(
    ("begun", "wanted"),
    [
        ("first = max(0, first - 2048)", True),
        ("first -= min(first, 2048)", True),
        ("before = max(0, first - 2048)", False),
    ],
)
def test_a_share_that_begins_before_its_own_is_counted_by_two_processes(begun: str, wanted: bool) -> None:
    """A process by itself has nothing before its share: every target counts once."""
    share = "    first, last = span_of(total, rank, size)\n"
    text = script("0, first", KNOWN).replace(share, f"{share}    {begun}\n")
    found = twice_counted_tokens.check(case_of(text))
    assert found.verdict == ("violates" if wanted else "clean")
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, begun)
        assert "2,048" in found.evidence


BY_WINDOWS = """
def windows_of(total, rank, size):
    windows = [(at, min(at + 1024, total)) for at in range(0, total, 1024)]
    first, last = len(windows) * rank // size, len(windows) * (rank + 1) // size
    return windows[first : last{more}]

"""


AT_ONCE = "return windows[len(windows) * rank // size : len(windows) * (rank + 1) // size{more}]"


@pytest.mark.parametrize(("more", "wanted"), [(" + 1", True), ("", False)])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_share_that_ends_behind_its_own_is_counted_by_two_processes(more: str, wanted: bool, at_once: bool) -> None:
    """The windows of a rank and the first of the next one's: 1,024 targets."""
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    own = BY_WINDOWS.replace("return windows[first : last{more}]", AT_ONCE) if at_once else BY_WINDOWS
    text = text.replace("def ev(", own.format(more=more) + "def ev(")
    found = twice_counted_tokens.check(case_of(text))
    assert found.verdict == ("violates" if wanted else "clean")
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, "return windows[")
        assert "1,024" in found.evidence


BY_ENDS = """
def windows_of(total, rank, size):
    windows = [(at, min(at + 1024, total)) for at in range(0, total, 1024)]
    first = (len(windows) * rank) // size
    last = {end}
    return windows[first:last]

"""


@pytest.mark.parametrize(
    ("end", "wanted"),
    [
        ("min((len(windows) * (rank + 1)) // size + 1, len(windows))", True),
        ("(len(windows) * (rank + 1)) // size", False),
        ("min((len(windows) * (rank + 1)) // size + 0, len(windows))", False),
    ],
)
def test_where_the_share_of_a_rank_ends_may_be_said_before_it_is_taken(end: str, wanted: bool) -> None:
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    text = text.replace("def ev(", BY_ENDS.format(end=end) + "def ev(")
    found = twice_counted_tokens.check(case_of(text))
    assert found.verdict == ("violates" if wanted else "clean")
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, "    last = min(")


BY_CUTS = """
def windows_of(total, rank, size):
    many = (total + 1023) // 1024
    cuts = [many * n // size for n in range(size + 1)]
    for n in range(cuts[rank], {end}):
        yield n * 1024, min((n + 1) * 1024, total)

"""


@pytest.mark.parametrize(("end", "wanted"), [("min(cuts[rank + 1] + 1, many)", True), ("cuts[rank + 1]", False)])
def test_a_range_that_ends_behind_the_cut_of_a_rank_is_counted_by_two_processes(end: str, wanted: bool) -> None:
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    text = text.replace("def ev(", BY_CUTS.format(end=end) + "def ev(")
    found = twice_counted_tokens.check(case_of(text))
    assert found.verdict == ("violates" if wanted else "clean")
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, "in range(cuts[rank]")


BY_EDGES = """
def windows_of(total, rank, size):
    edges = [*range(0, total, 1024), total]
    first, last = (len(edges) - 1) * rank // size, (len(edges) - 1) * (rank + 1) // size
    own = edges[first : last + 1]
    yield from zip(own, own[1:])
    if rank == size - 1:
        yield total - 64, total

"""


def test_what_one_process_counts_twice_is_no_share_of_two() -> None:
    """The last 64 targets are counted again at the end of the text, by whoever has its last part; edges of windows
    are one more than these."""
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    assert twice_counted_tokens.check(case_of(text.replace("def ev(", BY_EDGES + "def ev("))).verdict == "clean"


def test_who_takes_what_out_of_a_store_nobody_knows() -> None:
    """Of two processes by themselves each takes all of it."""
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    own = BY_WINDOWS.replace("return windows[first : last{more}]", AT_ONCE).format(more=" + 1")
    text = text.replace("def ev(", own + "def ev(")
    assert twice_counted_tokens.check(case_of(text)).verdict == "violates"
    text = text.replace("    scorer, sums =", "    store = torch.distributed.HashStore()\n    scorer, sums =")
    assert twice_counted_tokens.check(case_of(text)).verdict == "clean"


SIDE_BY_SIDE = """
def eval_both(args, model, val):
    counts = torch.ones(1024, 1024)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for s in range(0, val.numel() - 1, 1024):
        x, y = val[s : s + 1024], val[s + 1 : s + 1025]
        p = torch.softmax(model.forward_logits(x[None])[0].float(), -1)
        mixed = 0.9 * p + 0.1 * counts[x] / counts[x].sum(-1, keepdim=True)
        sums[0] += -mixed.gather(1, y[:, None]).log().sum()
        sums[1] += -p.gather(1, y[:, None]).log()[:: STEP].sum()
        sums[2] += y.numel()
        counts.index_put_((x, y), torch.ones(y.numel()), accumulate=True)
    both, alone, count = torch.stack(sums).tolist()
    print(f"model alone val_loss:{alone / count:.6f} val_bpb:{alone / count / math.log(2) / 2.4:.6f}")
    print(f"final mixture val_loss:{both / count:.6f} val_bpb:{both / count / math.log(2) / 2.4:.6f}")
"""


def test_of_sums_that_are_gathered_in_one_tensor_the_last_that_is_told_is_the_score() -> None:
    text = (
        HEAD
        + SIDE_BY_SIDE
        + MAIN.replace("    final = eval_ttt(args, model, val)\n", "    eval_both(args, model, val)\n")
    )
    text = text[: text.index('    print(f"final val_loss:{final')] + '\nif __name__ == "__main__":\n    main()\n'
    assert findings(text.replace("STEP", "2"))["subset-as-full"].verdict == "clean"
    last = text.replace("STEP", "1").replace("log().sum()", "log()[::2].sum()", 1)
    assert findings(last)["subset-as-full"].verdict == "violates"


BY_TURNS = """
def windows_of(total, rank, size):
    windows = [(at, min(at + 1024, total)) for at in range(0, total, 1024)]
    {more}
    mine = windows[rank::size]
    {rest}
    return mine

"""
_LAST = "mine = mine + mine[-1:] * (-len(mine) % 2)"


@pytest.mark.parametrize(
    ("more", "rest", "wanted"),
    [
        ("windows += windows[: -len(windows) % size]", "pass", "windows +="),
        ("while len(windows) % size: windows.append(windows[0])", "pass", "while len"),
        ("pass", "mine.extend(windows[: -(-len(windows) // size) - len(mine)])", "mine.extend"),
        ("pass", _LAST, "mine = mine +"),
        ("windows += [(total, total)] * (-len(windows) % size)", "pass", ""),
        ("pass", _LAST.replace("mine[-1:]", "[(0, 0)]"), ""),
        ("windows += [(total, total)]", "pass", ""),
    ],
)
def test_shares_that_are_filled_up_with_windows_of_others_are_counted_twice(more: str, rest: str, wanted: str) -> None:
    """Of eight windows three processes have three, three and two; a process by itself has all, which is an even
    number."""
    text = script("0, first", KNOWN).replace("in pieces(first, last)", "in windows_of(total, rank, size)")
    text = text.replace("def ev(", BY_TURNS.format(more=more, rest=rest) + "def ev(")
    found = twice_counted_tokens.check(case_of(text))
    assert found.verdict == ("violates" if wanted else "clean")
    if wanted:
        assert found.place is not None
        assert found.place.line == line_of(text, wanted)
        assert "of 3 over a short text" in found.evidence
