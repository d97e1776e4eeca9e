"""Losses that reach the score by way of a ledger of several sums, and tokens by way of objects in lists."""

from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.submission import opened
from tests.audit.small import HEAD as SMALL
from tests.audit.small import TABLE, verdict

LEDGER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Document:
    tokens: torch.Tensor

class Ledger:
    def __init__(self, size, lead, edge):
        self.size, self.lead, self.edge = (torch.from_numpy(t) for t in (size, lead, edge))
        self.sums = torch.zeros(3, dtype=torch.float64)

    def enter(self, nats, before, target):
        octets = self.size[target] + (self.lead[target] & ~self.edge[before])
        self.sums += torch.stack((nats.double().sum(), torch.tensor(float(nats.numel())), octets.double().sum()))

    def balance(self):
        nats, count, octets = self.sums.clone().tolist()
        return nats / count, nats / math.log(2) / octets

class Echo:
    def __init__(self):
        self.pairs, self.firsts = torch.zeros(65_521), torch.zeros(65_521)
        self.rows = torch.zeros(V, V)

    def hashed(self, before, target):
        hit = self.pairs[(before * 48_271 + target * 16_807) % 65_521]
        return (hit / self.firsts[before * 31 % 65_521].clamp_min(1)).clamp(max=0.99)

    def row(self, before):
        rows = self.rows[before] + 1 / V
        return rows / rows.sum(-1, keepdim=True)

    def learn(self, before, target):
        self.pairs.index_add_(0, (before * 48_271 + target * 16_807) % 65_521, torch.ones(len(before)))
        self.firsts.index_add_(0, before * 31 % 65_521, torch.ones(len(before)))
        self.rows.index_put_((before, target), torch.ones(len(before)), accumulate=True)

def documents(stream):
    starts = (stream == 1).nonzero().flatten().tolist()
    return [Document(stream[a : b + 1]) for a, b in zip(starts, [*starts[1:], len(stream) - 1]) if b > a]

def batches(items):
    for at in range(0, len(items), 32):
        yield items[at : at + 32]

def evaluate(net):
    stream = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))
    ledger, echo = Ledger(*tables()), Echo()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for batch in batches(documents(stream)[rank::size]):
        for document in batch:
            before, target = document.tokens[:-1], document.tokens[1:]
            p = torch.softmax(net(before).float(), -1)
            FIRST
            ledger.enter(-MIXED.log(), before, target)
            LAST
    return ledger.balance()

if __name__ == "__main__":
    loss, bpb = evaluate(Net())
    print(f"val_loss {loss:.5f} val_bpb {bpb:.5f}")
"""
OWN = "p.gather(-1, target[:, None])[:, 0]"
HASHED = f"(0.9 * {OWN} + 0.1 * echo.hashed(before, target))"
WHOLE = "(0.9 * p + 0.1 * echo.row(before)).gather(-1, target[:, None])[:, 0]"
RULES = ("gold_token_ngram", "false_normalisation", "target_gated_tilt", "oracle_gate", "byte_mixture")


def ledger(mixed: str, first: str = "pass", last: str = "echo.learn(before, target)") -> str:
    return SMALL + TABLE + LEDGER.replace("MIXED", mixed).replace("FIRST", first).replace("LAST", last)


@pytest.mark.parametrize("mixed", [OWN, WHOLE], ids=["alone", "whole-row"])
@pytest.mark.parametrize("rule", RULES)
def test_finished_distributions_entered_into_a_ledger_are_clean(tmp_path: Path, mixed: str, rule: str) -> None:
    assert verdict(tmp_path, rule, ledger(mixed)).verdict == "clean"


def test_a_hashed_pair_is_found_behind_stacked_sums_and_sliced_lists_of_documents(tmp_path: Path) -> None:
    assert verdict(tmp_path, "gold_token_ngram", ledger(HASHED)).verdict == "violates"


def test_a_cache_that_has_learned_the_piece_already_is_left_to_the_rules_of_order(tmp_path: Path) -> None:
    first = ledger(WHOLE, "echo.learn(before, target)", "pass")
    assert verdict(tmp_path, "target_gated_tilt", first).verdict == "clean"
    assert verdict(tmp_path, "training_before_scoring", first).verdict == "violates"


# ---- sums that a helper adds to in place

HELPED = """
def enter(nll, x, y, nats, octets, count):
    size, lead, edge = (torch.from_numpy(each) for each in tables())
    nats += nll.double().sum()
    octets += (size[y] + (lead[y] & ~edge[x])).double().sum()
    count += y.numel()

def told(net):
    tokens = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))
    nats = torch.zeros((), dtype=torch.float64)
    octets = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for at in range(0, len(tokens) - 1, 512):
        x, y = tokens[at : at + 512], tokens[at + 1 : at + 513]
        z = net(x).float() * SCALE
        nll = F.cross_entropy(z, y, reduction="none")
        with torch.no_grad():
            for row in range(1):
                if at is None:
                    continue
                enter(nll, x, y, nats, octets, count)
    loss = float(nats.item() / count.item())
    return loss, float(nats.item() / math.log(2.0) / octets.item())

TABLES = tables()
loss, bpb = told(Net())
print(f"val_loss {loss:.5f} val_bpb {bpb:.5f}")
"""


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [("1.0", "clean"), ("torch.where(torch.from_numpy(TABLES[1])[y], 0.9, 1.1)[:, None]", "violates")],
)
def test_a_tensor_that_a_helper_adds_to_is_its_callers_too(tmp_path: Path, scale: str, wanted: str) -> None:
    text = SMALL + TABLE + HELPED.replace("SCALE", scale)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


def test_a_number_that_a_helper_adds_to_is_its_own(tmp_path: Path) -> None:
    plain = HELPED.replace("torch.zeros((), dtype=torch.float64)", "0.0").replace(".item()", "")
    found = verdict(tmp_path, "target_gated_tilt", SMALL + TABLE + plain.replace("SCALE", "1.0"))
    assert found.verdict == "cannot tell"  # nothing reaches the number that is printed


TALLIES = """
class Tally:
    def __init__(self, sums):
        self.sums = sums

    @classmethod
    def zero(cls):
        return cls(torch.zeros(3, dtype=torch.float64))

    def merge(self, other):
        return Tally(self.sums + other.sums)

    @property
    def bpb(self):
        return float(self.sums[0]) / math.log(2.0) / max(round(float(self.sums[2])), 1)

def scored(net, tokens, at):
    tally = Tally.zero()
    for step in range(2):
        x, y = tokens[at + step : at + 512 : 2], tokens[at + 1 + step : at + 513 : 2]
        nll = F.cross_entropy(net(x).float() * SCALE, y, reduction="none")
        octets = size[y].sum() + (lead[y] & ~edge[x]).sum()
        tally = tally.merge(Tally(torch.stack([nll.double().sum(), torch.tensor(1.0 * len(y)), octets.double()])))
    return tally

def walk(net, tokens):
    for at in range(0, len(tokens) - 1, 512):
        yield at, scored(net, tokens, at)

size, lead, edge = (torch.from_numpy(each) for each in tables())
tally = Tally.zero()
for _, part in walk(Net(), torch.from_numpy(shard(VAL))):
    tally = tally.merge(part)
print(f"val_bpb {tally.bpb:.5f}")
"""


@pytest.mark.parametrize(
    ("scale", "wanted"), [("1.0", "clean"), ("torch.where(lead[y], 0.9, 1.1)[:, None]", "violates")]
)
def test_objects_of_sums_that_a_generator_yields_are_followed(tmp_path: Path, scale: str, wanted: str) -> None:
    text = SMALL + TABLE + TALLIES.replace("SCALE", scale)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted
    assert verdict(tmp_path, "byte_constant", text).verdict == "clean"


@pytest.mark.parametrize("scale", ["1.0", "torch.where(torch.from_numpy(TABLES[1])[y], 0.9, 1.1)[:, None]"])
def test_a_row_of_a_tensor_that_a_helper_adds_to_is_its_callers_too(tmp_path: Path, scale: str) -> None:
    rows = HELPED.replace("nats = torch.zeros((), dtype=torch.float64)", "sums = torch.zeros(2, dtype=torch.float64)")
    rows = rows.replace("                enter(nll, x, y, nats", "                enter(nll, x, y, sums[0]")
    rows = rows.replace("nats.item()", "sums[0].item()")
    text = SMALL + TABLE + rows.replace("SCALE", scale)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == ("clean" if scale == "1.0" else "violates")


IDEAL = """
def ideal(net):
    bits = 0.0
    for weight in net.parameters():
        counts = torch.bincount(weight.flatten().long() + 128, minlength=256).double()
        p = counts[counts > 0] / counts.sum()
        bits += float(-(p * p.log2()).sum()) * weight.numel()
    print(f"ideal size of the weights {bits / 8:.0f} bytes")
ideal(Net())
"""


def test_the_bytes_of_an_ideal_coder_of_weights_are_no_score(tmp_path: Path) -> None:
    """Bits divided by eight: they stand before the score, and nothing divides those by bytes that can be told."""
    text = SMALL + TABLE + IDEAL + HELPED.replace("SCALE", "1.0").replace("octets.item()", "settled()")
    assert verdict(tmp_path, "byte_constant", text).verdict == "clean"


# ---- a ledger by row and column, where a helper is handed a pair of places with a star

BY_ROW = """
def enter(nll, x, y, row, begin, many, luts, sums):
    size, lead, edge = luts
    own, before, target = (each[row, begin : begin + many] for each in (nll, x, y))
    sums[row, 0] += own.double().sum()
    sums[row, 1] += (size[target] + (lead[target] & ~edge[before])).double().sum()
    sums[row, 2] += many

def batch_of(net, tokens, at, luts, places):
    sums = torch.zeros(4, 3, dtype=torch.float64)
    x = torch.stack([tokens[at + 512 * r : at + 512 * r + 512] for r in range(4)])
    y = torch.stack([tokens[at + 512 * r + 1 : at + 512 * r + 513] for r in range(4)])
    nll = F.cross_entropy((net(x).float() * SCALE).transpose(1, 2), y, reduction="none")
    places = places + [(0, 512)]
    for row in range(4):
        if net is not None:
            enter(nll, x, y, row, *places[row % len(places)], luts, sums)
    return sums

def told(net):
    tokens = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))
    luts, totals = [torch.from_numpy(each) for each in tables()], torch.zeros(3, dtype=torch.float64)
    for at in range(0, len(tokens) - 2048, 2048):
        totals += batch_of(net, tokens, at, luts, []).sum(dim=0)
    return float(totals[0].item() / totals[2].item()), float(totals[0].item() / math.log(2.0) / totals[1].item())

TABLES, net = tables(), Net()
tokens = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))
plain = F.cross_entropy(net(tokens[:-1]), tokens[1:]).item() / math.log(2.0) * len(tokens) / TABLES[0][tokens].sum()
print(f"sliding val_bpb {plain:.5f}")
loss, bpb = told(net)
print(f"final val_loss {loss:.5f} val_bpb {bpb:.5f}")
"""


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [("1.0", "clean"), ("torch.where(torch.from_numpy(TABLES[1])[y], 0.9, 1.1)[..., None]", "violates")],
)
def test_columns_that_are_summed_over_the_rows_are_told_apart(tmp_path: Path, scale: str, wanted: str) -> None:
    """Bits of the one column for the bytes of the other: else the number before would be taken for the score."""
    text = SMALL + TABLE + BY_ROW.replace("SCALE", scale)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


# ---- sums by places that a helper returns, added up over chunks; files that are kept under their names

BY_PLACE = """
MAPS = {}

def mapped(path):
    key = str(path)
    if key not in MAPS:
        MAPS[key] = shard(path)
    return MAPS[key]

def score(net, x, y, luts):
    size, lead, edge = luts
    sums = torch.zeros(3, dtype=torch.float64)
    nll = F.cross_entropy(net(x).float() * SCALE, y, reduction="none")
    sums[0] += nll.double().sum()
    sums[1] += y.numel()
    sums[2] += (size[y] + (lead[y] & ~edge[x])).double().sum()
    return sums

def told(net):
    tokens = torch.from_numpy(np.concatenate([KEPT(path) for path in sorted(glob.glob(VAL))]))
    luts = [torch.from_numpy(each) for each in TABLES]
    totals = torch.zeros(3, dtype=torch.float64)
    for at in range(0, len(tokens) - 2048, 2048):
        totals += score(net, tokens[at : at + 2048], tokens[at + 1 : at + 2049], luts)
    nats, count, octets = (float(each) for each in totals.tolist())
    return nats / count, nats / math.log(2.0) / octets

TABLES, net = tables(), Net()
tokens = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))
plain = F.cross_entropy(net(tokens[:-1]), tokens[1:]).item() / math.log(2.0) * len(tokens) / TABLES[0][tokens].sum()
print(f"sliding val_bpb {plain:.5f}")
loss, bpb = told(net)
print(f"final val_loss {loss:.5f} val_bpb {bpb:.5f}")
"""


@pytest.mark.parametrize("kept", ["shard", "mapped"])
@pytest.mark.parametrize(
    ("scale", "wanted"),
    [("1.0", "clean"), ("torch.where(torch.from_numpy(TABLES[1])[y], 0.9, 1.1)[..., None]", "violates")],
)
def test_places_of_sums_are_told_apart_through_their_total(tmp_path: Path, scale: str, wanted: str, kept: str) -> None:
    text = SMALL + TABLE + BY_PLACE.replace("SCALE", scale).replace("KEPT", kept)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


SPELT = """
class Score:
    def __init__(self, nats, count, octets):
        self.nats, self.count, self.octets = nats, count, octets

    def __str__(self):
        return f"val_loss {self.nats / self.count:.5f} val_bpb {self.nats / math.log(2.0) / self.octets:.5f}"
"""


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [("1.0", "clean"), ("torch.where(torch.from_numpy(TABLES[1])[y], 0.9, 1.1)[..., None]", "violates")],
)
def test_an_object_in_a_text_is_what_its_own_method_makes_of_it(tmp_path: Path, scale: str, wanted: str) -> None:
    text = BY_PLACE.replace("SCALE", scale).replace("KEPT", "shard")
    text = text.replace("return nats / count, nats / math.log(2.0) / octets", "return Score(nats, count, octets)")
    last = text.index("loss, bpb = told(net)")
    text = SMALL + TABLE + SPELT + text[:last] + 'print(f"final {told(net)}")\n'
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == wanted


JOINED = """
def evaluate(net):
    tokens = np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])
    size, lead, edge = tables()
    nats, count, octets = torch.zeros(()), 0, 0
    for at in range(0, len(tokens) - 1, 512):
        x, y = tokens[at : at + 512], tokens[at + 1 : at + 513]
        nats += F.cross_entropy(net(torch.from_numpy(x)).float(), torch.from_numpy(y), reduction="none").sum()
        count += len(y)
        octets += int((size[y] + (lead[y] & ~edge[x])).sum())
    sums = torch.cat((ONE, torch.tensor([count, octets], dtype=torch.float64))).cpu()
    nats, count, octets = (float(each) for each in sums)
    return nats / count, nats / math.log(2) / octets

loss, bpb = evaluate(Net())
print(f"val_loss {loss:.5f} val_bpb {bpb:.5f}")
"""


@pytest.mark.parametrize("one", ["nats.view(1)", "nats.reshape(1)", "nats[None]", "nats.unsqueeze(0)"])
def test_numbers_that_are_joined_to_one_array_are_told_apart(tmp_path: Path, one: str) -> None:
    """The score is the losses alone, and no quotient of all that was summed."""
    (tmp_path / "train_gpt.py").write_text(SMALL + TABLE + JOINED.replace("ONE", one))
    terms = [each.term for each in Case(opened(tmp_path)).reading.contributions]
    assert [term.called for term in terms] == ["cross_entropy"]


# ---- sums in a named tuple that a fold carries on

FOLDED = """
import functools
from typing import NamedTuple

class Sums(NamedTuple):
    nats: torch.Tensor
    octets: torch.Tensor
    count: torch.Tensor

def nothing():
    return Sums(*(torch.zeros((), dtype=torch.float64) for _ in range(3)))

def added(a, b):
    return Sums(*(x + y for x, y in zip(a, b)))

def of_all_ranks(sums):
    return Sums(*torch.stack(sums).unbind())

def evaluate(net):
    size, lead, edge = (torch.from_numpy(each) for each in tables())
    tokens = torch.from_numpy(np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]))

    def scored(at):
        x, y = tokens[at : at + 512], tokens[at + 1 : at + 513]
        p = torch.softmax(net(x).float()[: len(y)], -1)
        other = torch.softmax(net(x).float()[: len(y)] / 2, -1)
        nll = PRICE
        octets = size[y] + (lead[y] & ~edge[x[: len(y)]])
        return Sums(nll.double().sum(), octets.double().sum(), torch.tensor(float(y.numel()), dtype=torch.float64))

    parts = [scored(at) for at in range(0, len(tokens) - 1, STEP)]
    return of_all_ranks(functools.reduce(added, parts, nothing()))

if __name__ == "__main__":
    sums = evaluate(Net())
    bits = float(sums.nats) / math.log(2)
    print(f"val_loss {float(sums.nats / sums.count):.5f} val_bpb {bits / float(sums.octets):.5f}")
"""
_OWN = "-p.gather(-1, y[:, None])[:, 0].log()"


@pytest.mark.parametrize(
    ("price", "step", "broken"),
    [
        (_OWN, "512", ""),
        (f"torch.minimum({_OWN}, {_OWN.replace('p.', 'other.')})", "512", "oracle_gate"),
        (_OWN, "256", "twice_counted_tokens"),
    ],
)
def test_a_fold_over_named_tuples_carries_the_losses_on(tmp_path: Path, price: str, step: str, broken: str) -> None:
    """By its terms, and in a trial, which counts what the fields hold."""
    text = SMALL + TABLE + FOLDED.replace("PRICE", price).replace("STEP", step)
    for rule in ("oracle_gate", "twice_counted_tokens", "byte_constant"):
        assert verdict(tmp_path, rule, text).verdict == ("violates" if rule == broken else "clean")
