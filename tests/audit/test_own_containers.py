"""Objects that are containers themselves, `class Registry(dict)`: what lies in them is followed by both readings."""
# ruff: noqa: E501 (examples are texts of scripts)

from pathlib import Path

import pytest

from tests.audit.order import HEAD, broken, doubted
from tests.audit.small import COUNT
from tests.audit.test_flow_language import ADAPT_STAGE, CHUNKS, PRICE_STAGE, WALK
from tests.audit.test_terms_language import BETTER, RULES, verdicts
from tests.audit.ways import WAYS

SUMS = """    nats = octets = 0.0
    for x, y in pieces(all_tokens()):
        nats += price(net, x, y).sum().item()
        octets += octets_of(x, y)
    return nats / math.log(2) / octets
"""
DECORATOR = """
class Registry(dict[str, object]):
    def __call__(self, name):
        def keep(thing):
            self[name] = thing
            return thing
        return keep
"""
OWN = {
    "a registry that is a dict and a decorator": DECORATOR
    + f"""
SCORERS = Registry()
@SCORERS("plain")
def evaluate(net):
{SUMS}
print(f"val_bpb {{SCORERS[os.environ.get('MODE', 'plain')](NET):.4f}}")
""",
    "several registries made at once": DECORATOR
    + f"""
SCORERS, OTHERS = (Registry() for _ in range(2))
@OTHERS("plain")
def nothing(net):
    return 0.0
@SCORERS("plain")
def evaluate(net):
{SUMS}
@OTHERS("plain")
def less(net):
    return 1.0
print(f"val_bpb {{SCORERS['plain'](NET):.4f}}")
""",
    "a dict that writes through super": """
class Sums(dict):
    def __init__(self, *names):
        super().__init__({name: 0.0 for name in names})
    def __setitem__(self, name, value):
        super().__setitem__(name, value)
sums = Sums("nats", "octets")
for x, y in pieces(all_tokens()):
    sums["nats"] = sums.get("nats", 0.0) + price(NET, x, y).sum().item()
    sums["octets"] = sums.get("octets", 0.0) + octets_of(x, y)
print(f"val_bpb {sums['nats'] / sums['octets'] / math.log(2):.4f}")
""",
    "a dict whose entries are names": """
class Settings(dict):
    def __getattr__(self, name):
        return self[name]
sums = Settings(nats=0.0, octets=0.0)
for x, y in pieces(all_tokens()):
    sums["nats"] += price(NET, x, y).sum().item()
    sums["octets"] += octets_of(x, y)
print(f"val_bpb {sums.nats / sums.octets / math.log(2):.4f}")
""",
    "a list of rows": """
class Rows(list):
    def note(self, nats, octets):
        self.append((nats, octets))
rows = Rows()
for x, y in pieces(all_tokens()):
    rows.note(price(NET, x, y).sum().item(), float(octets_of(x, y)))
nats, octets = (sum(column) for column in zip(*rows))
print(f"val_bpb {nats / octets / math.log(2):.4f}")
""",
}


@pytest.mark.parametrize("way", OWN)
def test_bytes_and_losses_are_followed_through_it(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, way, OWN[way])
    clean = dict.fromkeys(RULES, "clean")
    assert verdicts(tmp_path, way) == clean
    assert verdicts(tmp_path, way, fault=BETTER) == {**clean, "oracle_gate": "violates"}
    assert verdicts(tmp_path, way, count=COUNT + " + lead[y].sum()") == {**clean, "byte_double_space": "violates"}


STAGES = {
    "a dict": DECORATOR.replace("Registry", "Stages") + "stage = Stages()\n",
    "a dict that writes through super": "class Stages(dict):\n    def __call__(self, name):\n"
    "        return lambda function: super(Stages, self).__setitem__(name, function) or function\nstage = Stages()\n",
    "a list": "class Stages(list):\n    def __call__(self, name):\n        return lambda function: self.append(function) or function\n"
    "    def values(self):\n        return self\nstage = Stages()\n",
}
RUN = """
def walk(args, model, val):
    state = {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=1e-3), "total": 0.0, "count": 0}
CHUNKS        for run in stage.values():
            state = run(state, x, y)
    return state["total"] / state["count"]
""".replace("CHUNKS", CHUNKS)


@pytest.mark.parametrize("made", STAGES)
def test_what_is_kept_in_it_runs_in_its_order(made: str) -> None:
    assert doubted(HEAD + STAGES[made] + PRICE_STAGE + ADAPT_STAGE + RUN + WALK) == set()
    assert broken(HEAD + STAGES[made] + ADAPT_STAGE + PRICE_STAGE + RUN + WALK) == {"training-before-scoring"}
