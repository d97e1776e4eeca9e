"""Parts of sums and lists under other names, and what stands beside losses: counts, tables that came with the weights."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.flow.containers import _asks
from fairway.audit.flow.heap import Heap
from fairway.audit.flow.tokens import Tok
from fairway.audit.flow.values import RAW, Value
from tests.audit.order import broken, trace_of
from tests.audit.test_flow_forms import HEAD


def said(text: str) -> int:
    """How many losses are in the last number that a script says."""
    trace = trace_of(HEAD + text)
    return bin(trace.said[-1].value.losses).count("1") if trace.said else 0


SUMS = """
def book(sums, nll, count):
    sums += torch.stack((nll.sum(), torch.tensor(float(count))))

class Book:
    def enter(self, sums, nll, count):
        sums += torch.stack((nll.sum(), torch.tensor(float(count))))

sums = torch.zeros(2, 2)
for at in range(0, n - 1024, 1024):
    nll = F.cross_entropy(net.logits(val[at : at + 1024]), val[at + 1 : at + 1025], reduction="none")
    ENTERED
whole = sums.sum(0)
print(f"final val_loss:{(whole[0] / whole[1]).item():.6f}")
"""


@pytest.mark.parametrize(
    "entered",
    ["book(sums[int(at > 0)], nll, 1024)", "Book().enter(sums[int(at > 0)], nll, 1024)"],
    ids=["function", "method"],
)
def test_a_row_of_sums_that_a_function_adds_to_is_its_callers(entered: str) -> None:
    assert said(SUMS.replace("ENTERED", entered)) > 0


LEDGER = """
ledger = np.full(n, np.nan, dtype=np.float32)
for at in range(0, n - 1024, 1024):
    nll = F.cross_entropy(net.logits(val[at : at + 1024]), val[at + 1 : at + 1025], reduction="none")
    part = ledger[at : at + 1024]
    part[:] = nll.detach().numpy()
mine = np.flatnonzero(~np.isnan(ledger))
print(f"final val_loss:{float(ledger[mine].sum()) / len(mine):.6f}")
"""


def test_what_is_written_into_a_part_that_has_a_name_is_in_the_whole() -> None:
    assert said(LEDGER) > 0


COUNTED = """
nats, seen = torch.zeros(()), torch.zeros(1024, dtype=torch.int64)
for at in range(0, n - 1024, 1024):
    y = val[at + 1 : at + 1025]
    nats += F.cross_entropy(net.logits(val[at : at + 1024]), y, reduction="sum")
    seen += torch.bincount(y, minlength=1024)
print(f"final val_loss:{nats.item() / int(seen.sum()):.6f}")
"""


def test_losses_divided_by_what_was_counted_are_a_score_and_no_fit() -> None:
    trace = trace_of(HEAD + COUNTED)
    assert trace.said[-1].value.losses
    assert not trace.said[-1].value.choices
    assert not broken(HEAD + COUNTED)


GATHERED = """
book = {}
for d, at in enumerate(range(0, n - 1024, 1024)):
    book[d] = F.cross_entropy(net.logits(val[at : at + 1024]), val[at + 1 : at + 1025], reduction="sum").item()
shares = [(book, n)]
if dist.is_initialized():
    shares = [None] * world
    dist.all_gather_object(shares, (book, n))
print(f"final val_loss:{sum(v for losses, _ in shares for v in losses.values()) / n:.6f}")
"""


def test_pairs_that_may_be_gathered_into_a_list_of_nothing_stay_pairs() -> None:
    assert said(GATHERED) > 0


@pytest.mark.parametrize(("made_of", "asked"), [("val", True), ("train", False)])
def test_only_what_was_made_of_the_same_text_is_a_loss_where_it_is_read_at_its_tokens(
    made_of: str, asked: bool
) -> None:
    """Counts of the training text that came with the weights, `counts[tokens]`, are looked up."""
    state = Heap().new("instance", None)
    value = Value(states=frozenset((state,)), toks=frozenset((Tok(made_of),)))
    assert _asks(value, Value(toks=frozenset((Tok("val"),)), flags=RAW)) is asked
