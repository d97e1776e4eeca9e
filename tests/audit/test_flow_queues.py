"""Evaluations that keep documents in queues: stacks of contexts, threads, captured graphs, states put aside."""

import pytest

from tests.audit.order import broken
from tests.audit.test_flow_forms import whole

LANES = """
import collections, contextlib, functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

class Booked(NamedTuple):
    nll: float
    places: int

@dataclass
class Lane:
    first: int
    state: dict
    at: int = 0

def collate(lane):
    x, y = torch.zeros(1, 512, dtype=torch.int64), torch.zeros(1, 512, dtype=torch.int64)
    place = lane.first + lane.at * 512
    x[0, :512], y[0, :512] = val[place : place + 512], val[place + 1 : place + 513]
    return Batch(x, y)

class Delta(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(64))

delta = Delta().cuda()
opt = torch.optim.SGD(delta.parameters(), lr=1e-3)
fresh = {k: v.detach().clone() for k, v in delta.state_dict().items()}
booked = []

def nll(x, y):
    return F.cross_entropy(net.head(net.emb(x) + delta.shift).flatten(0, 1), y.flatten(), reduction="sum")

def score(batch):
    with torch.no_grad():
        booked.append(Booked(nll(batch.x, batch.y).item(), batch.y.numel()))

def learn(batch):
    opt.zero_grad(); nll(batch.x, batch.y).backward(); opt.step()

pending = collections.deque(range(0, n - 8192, 8192))
lanes = collections.deque()
with contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(max_workers=2))

    def admit():
        while pending and len(lanes) < 2:
            lane = Lane(pending.popleft(), fresh)
            lanes.append((lane, pool.submit(collate, lane)))

    admit()
    while lanes:
        lane, host = lanes.popleft()
        batch = host.result()
        delta.load_state_dict(lane.state)
        TURN
        lane.state = {k: v.detach().clone() for k, v in delta.state_dict().items()}
        lane.at += 1
        if lane.at < 16:
            lanes.append((lane, pool.submit(collate, lane)))
        admit()
total, count = sum(each.nll for each in booked), sum(each.places for each in booked)
"""
TURNS = {
    "score(batch); learn(batch)": set(),
    "learn(batch); score(batch)": {"training-before-scoring"},
    "score(batch); learn(batch); booked.pop(); score(batch)": {"rescoring-after-adaptation"},
}


@pytest.mark.parametrize("turn", TURNS)
def test_documents_in_lanes_are_followed_and_a_state_put_aside_is_not_made_anew(turn: str) -> None:
    assert broken(whole(LANES.replace("TURN", turn))) == TURNS[turn]


def test_the_lesser_of_two_named_tuples_is_a_choice_by_their_losses() -> None:
    best = "a, b = (Booked(f(batch.x, batch.y).item(), 512) for f in (nll, net)); booked.append(CHOSEN)"
    assert broken(whole(LANES.replace("TURN", best.replace("CHOSEN", "b")))) == set()
    assert broken(whole(LANES.replace("TURN", best.replace("CHOSEN", "min(a, b)")))) & {
        "min-over-passes",
        "choice-by-validation",
    }


GRAPH = """
class Replayed:
    def __init__(self, f):
        self.x, self.y = torch.zeros(1024, dtype=torch.int64), torch.zeros(1024, dtype=torch.int64)
        f(self.x, self.y)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = f(self.x, self.y)

    def __call__(self, x, y):
        self.x.copy_(x); self.y.copy_(y)
        self.graph.replay()
        return self.out.clone()

replayed = Replayed(net)
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for s in range(0, n - 1024, 1024):
    x, y = val[s : s + 1024], val[s + 1 : s + 1025]
    BEFORE
    total += replayed(x, y).item() * 1024
    count += 1024
    AFTER
"""
LEARN = "opt.zero_grad(); net(x, y).backward(); opt.step()"


def test_a_captured_graph_does_again_what_was_captured_on_what_its_tensors_hold() -> None:
    assert broken(whole(GRAPH.replace("BEFORE", "pass").replace("AFTER", LEARN))) == set()
    early = whole(GRAPH.replace("BEFORE", LEARN).replace("AFTER", "pass"))
    assert broken(early) == {"training-before-scoring"}


SWAPPED = """
import contextlib

@contextlib.contextmanager
def adapted(model):
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for s in range(0, n - 1024, 1024):
        opt.zero_grad(); model(val[s : s + 1024], val[s + 1 : s + 1025]).backward(); opt.step()
    yield model
    model.load_state_dict(kept)

def put_back(model, kept): model.load_state_dict(kept)

def judge():
    total, count = 0.0, 0
    for s in range(0, n - 1024, 1024):
        total += net(val[s : s + 1024], val[s + 1 : s + 1025]).item() * 1024
        count += 1024
    return total, count

"""
WITHIN = "with contextlib.ExitStack() as stack:\n    stack.enter_context(adapted(net))\n    INSIDE\nOUTSIDE\n"
CALLED_BACK = """
with contextlib.ExitStack() as stack:
    stack.callback(put_back, net, {k: v.clone() for k, v in net.state_dict().items()})
    train(net, val)
    INSIDE
OUTSIDE
"""


@pytest.mark.parametrize("way", [WITHIN, CALLED_BACK])
def test_what_a_stack_has_entered_lasts_to_its_end(way: str) -> None:
    judged = "total, count = judge()"
    outside = way.replace("INSIDE", "pass").replace("OUTSIDE", judged)
    inside = way.replace("INSIDE", judged).replace("OUTSIDE", "pass")
    assert broken(whole(SWAPPED + outside)) == set()
    assert broken(whole(SWAPPED + inside)) & {"training-before-scoring", "validation-in-training"}


COPIED = """
import copy
class Settings:
    def __init__(self): self.most = 0
settings = Settings()

def judge(settings):
    total, count = 0.0, 0
    text = val[: settings.most] if settings.most > 0 else val
    for s in range(0, text.numel() - 1024, 1024):
        total += net(text[s : s + 1024], text[s + 1 : s + 1025]).item() * 1024
        count += 1024
    return total, count

small = COPY
small.most = 65536
total, count = judge(small)
print(f"smoke {total / count:.3f}")
total, count = judge(settings)
"""


def test_a_copy_of_settings_is_another_object() -> None:
    assert broken(whole(COPIED.replace("COPY", "copy.copy(settings)"))) == set()
    assert broken(whole(COPIED.replace("COPY", "settings"))) == {"subset-as-full"}
