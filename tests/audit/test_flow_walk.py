"""The walk through a script: what it follows, and that nothing that Python can say makes it fall or hang."""

import time

import pytest

from fairway.audit.flow.events import Said, Score, Trace, Unknown, Update
from tests.audit.order import HONEST, broken, doubted, findings, line_of, trace_of

START = """
import functools, os, glob, numpy as np, torch, torch.nn as nn, torch.nn.functional as F
val = torch.from_numpy(np.fromfile("data/x_val_0.bin", dtype="<u2"))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(9, 8), nn.Linear(8, 9)
    def forward(self, x, y):
        return F.cross_entropy(self.o(self.e(x)), y)
net = Net()
def loss(a, b): return net(val[a:b], val[a + 1 : b + 1])
"""


def said(text: str) -> list[Said]:
    return trace_of(START + text).said


@pytest.mark.parametrize(
    "text",
    [
        "print(loss(0, 9).item())",
        "results = {'a': [loss(0, 9)]}\nprint(f\"{results['a'][0]:.4f}\")",
        "def gen():\n    for i in range(0, val.numel(), 9):\n        yield loss(i, i + 9)\nprint(sum(gen()))",
        "print(functools.reduce(lambda t, i: t + loss(i, i + 9), range(0, len(val), 9), 0.0))",
        "total = torch.zeros(())\nfor i in range(0, len(val), 9):\n    total.add_(loss(i, i + 9))\nprint(total / 3)",
        "class Sum:\n    def __init__(self): self.x = 0\n    def __iadd__(self, o): return self\n"
        "    def add(self, o): self.x += o\n    @property\n    def mean(self): return self.x / 2\n"
        "s = Sum()\ns.add(loss(0, 9))\nprint(s.mean)",
        "import logging\nlogging.getLogger('x').info('loss %f', loss(0, 9))",
        "with open('result.json', 'w') as f:\n    import json\n    json.dump({'val_loss': loss(0, 9).item()}, f)",
        "a, *b = (loss(0, 9), 1, 2)\nprint(a)",
        "f = functools.partial(loss, 0)\nprint((g := f)(9))",
    ],
)
def test_a_loss_is_followed_to_where_it_is_said(text: str) -> None:
    found = said(text)
    assert found
    assert all(each.value.losses for each in found)


def test_what_is_no_loss_is_not_said() -> None:
    assert said("print(val.numel(), loss.__name__, 'val_loss 1.1')") == []


def updates(trace: Trace) -> list[Update]:
    return [event for event in trace.events if isinstance(event, Update)]


@pytest.mark.parametrize(
    "step",
    [
        "opt = torch.optim.SGD(net.parameters(), lr=1)\nloss(0, 9).backward()\nopt.step()",
        "opts = [torch.optim.Adam([{'params': [p for n, p in net.named_parameters() if 'e' in n]}])]\n"
        "loss(0, 9).backward()\nfor o in opts:\n    o.step()",
        "loss(0, 9).backward()\nfor p in net.parameters():\n    p.data -= 0.1 * p.grad",
        "g = torch.autograd.grad(loss(0, 9), list(net.parameters()))\n"
        "for p, d in zip(net.parameters(), g):\n    p.copy_(p - 0.1 * d)",
        "from torch.cuda.amp import GradScaler\ns, o = GradScaler(), torch.optim.SGD(net.parameters(), 1)\n"
        "s.scale(loss(0, 9)).backward()\ns.step(o)",
        "class Mine(torch.optim.Optimizer):\n    def __init__(self, ps): super().__init__(ps, {})\n"
        "    def step(self):\n        for g in self.param_groups:\n            for p in g['params']: p.add_(p.grad)\n"
        "o = Mine(net.parameters())\nloss(0, 9).backward()\no.step()",
    ],
)
def test_every_way_to_learn_is_an_update_of_the_model(step: str) -> None:
    trace = trace_of(START + step + "\nprint(loss(9, 18))")
    assert updates(trace)
    last = [event for event in trace.events if isinstance(event, Score)][-1]
    assert last.knows


@pytest.mark.parametrize(
    "restore",
    [
        "net.load_state_dict(kept)",
        "for n, p in net.named_parameters():\n    if n in kept:\n        p.data.copy_(kept[n])",
        "net = Net()",
    ],
)
def test_a_restored_model_knows_nothing_of_its_warm_up(restore: str) -> None:
    text = (
        "kept = {k: v.detach().clone() for k, v in net.state_dict().items()}\nloss(0, 9).backward()\n"
        "torch.optim.SGD(net.parameters(), lr=1).step()\n" + restore + "\nprint(loss(0, 9))"
    )
    trace = trace_of(START + text)
    assert updates(trace)
    assert all(score.knows == 0 for score in trace.scored(trace.said[-1].value.losses))


def test_live_references_are_no_snapshot() -> None:
    text = (
        "kept = net.state_dict()\nloss(0, 9).backward()\ntorch.optim.SGD(net.parameters(), lr=1).step()\n"
        "net.load_state_dict(kept)\nprint(loss(0, 9))"
    )
    trace = trace_of(START + text)
    assert all(score.knows for score in trace.scored(trace.said[-1].value.losses))


ZOO = """
from __future__ import annotations
import asyncio, contextlib, dataclasses, enum, typing
type_checking = typing.TYPE_CHECKING
@dataclasses.dataclass(slots=True)
class Point:
    x: int = 1
    y: "int" = 2
class Kind(enum.Enum):
    A = 1
async def work(n: int, /, *rest, k=2, **more) -> int:
    async with contextlib.AsyncExitStack() as stack:
        async for item in stack:
            await item
    return [i async for i in stack if i]
def outer():
    n = 0
    def inner():
        nonlocal n
        n += 1
        return n
    return inner() + inner()
def walk(v):
    match v:
        case Point(x=0, y=b) | [0, b, *_]: return b
        case {"k": k, **rest} if k: return rest
        case "a" | 3 | None: return v
        case _: pass
try:
    raise ValueError
except* ValueError as group:
    del group
finally:
    pass
for i in range(3):
    if i: continue
    else: break
else:
    print(i)
while (n := outer()) > 3: pass
with open("a") as f, open("b") as g: f.write(g.read())
x = y = [*range(3), *{1, 2}, *()]
x[0], (y[1:], *z) = 1, ([2], 3)
a: int
a = b = lambda *p, q=1, **r: (yield)
print(f"{x!r:>{3}} {y[0] if x else z}" "tail", *x, sep="", **{})
assert x, "message"
global_value = {**{}, "k": [i for j in x for i in y if i if j]}
exec("q = 1"); eval("q + 1"); exec(unknown_name)
del x[0], y
getattr(Point, "x" + str(a)); (lambda: 0)()(); not_there.at.all(1)[2](3)
def recursive(n): return recursive(n - 1) if n else recursive
recursive(9)
class Loop(Loop2 if a else object): x = 1
"""


def test_any_syntax_goes_through() -> None:
    trace = trace_of(ZOO)
    assert trace.complete
    assert any(isinstance(event, Unknown) for event in trace.events)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "+".join(["1"] * 900),
        "x = " + "(" * 80 + "1" + ")" * 80,
        "\n".join(f"def f{i}(): return f{i + 1}() + f{i + 1}()" for i in range(60)) + "\ndef f60(): return 1\nf0()",
        "for a in x:\n" + "".join(" " * i + f"for v{i} in x:\n" for i in range(1, 18)) + " " * 18 + "f(a)",
        "x = [" + ",".join(map(str, range(50_000))) + "]",
        "a = 'x' * 10 ** 12\nb = 2 ** 10 ** 9\nc = [0] * 10 ** 12\nd = 1 << 10 ** 9",
        "class A:\n    def __getattr__(self, n): return getattr(self, n)\nA().x",
        "def f():\n    yield from f()\nlist(f())",
    ],
)
def test_time_and_depth_are_bounded(text: str) -> None:
    started = time.process_time()  # not by the wall: a starved machine takes 30 s for 1
    trace = trace_of(text, fuel=60_000)
    assert time.process_time() - started < 20  # 1 s here; a hang would be forever
    assert trace.steps <= 60_001


def test_a_walk_that_gives_up_says_so() -> None:
    trace = trace_of(HONEST, fuel=2_000)
    assert not trace.complete
    assert trace.unknowns()[-1].why == "the script has more steps than are followed"


@pytest.mark.parametrize("cut", range(0, 40))
def test_a_script_with_a_line_missing_is_walked(cut: int) -> None:
    lines = HONEST.splitlines()
    start = line_of(HONEST, "def train(")
    kept = "\n".join(lines[: start + cut] + lines[start + cut + 1 :])
    try:
        compile(kept, "x", "exec")
    except SyntaxError:
        return
    assert trace_of(kept, fuel=20_000).steps


def test_a_shard_that_is_read_inside_an_assertion_is_validation_text():
    """`readinto` fills what it is given, and an assertion is walked for what its condition does."""
    text = """
import glob
from pathlib import Path
import torch
import torch.nn.functional as F

def load(file):
    count = int(torch.from_file(str(file), False, 256, dtype=torch.int32)[2])
    with file.open("rb", buffering=0) as opened:
        tokens = torch.empty(count, dtype=torch.uint16)
        opened.seek(1024)
        assert opened.readinto(tokens.numpy()) == 2 * count
    return tokens

model = torch.nn.Linear(8, 8)
val = torch.cat([load(Path(p)) for p in sorted(glob.glob("data/fineweb_val_*.bin"))])
opt = torch.optim.SGD(model.parameters(), lr=0.1)
total = 0.0
for at in range(0, len(val) - 64, 64):
    FIRST
    SECOND
print(f"val_loss:{total / len(val):.6f}")
"""
    score = "total += F.cross_entropy(model(val[at : at + 64]), val[at + 1 : at + 65]).item()"
    learn = "F.cross_entropy(model(val[at : at + 64]), val[at + 1 : at + 65]).backward(); opt.step()"
    honest, other = (text.replace("FIRST", a).replace("SECOND", b) for a, b in ((score, learn), (learn, score)))
    assert not broken(honest)
    assert not doubted(honest)
    assert broken(other) <= {"training-before-scoring", "validation-in-training"}
    assert broken(other)


GROWN = """
import glob, os
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

def load(pattern):
    return torch.cat([torch.from_numpy(np.fromfile(p, "<u2").astype(np.int64)) for p in sorted(glob.glob(pattern))])

held, text = load("data/shards_val_*.bin"), load("data/shards_train_*.bin")
model, heads = nn.Sequential(nn.Embedding(1024, 64), nn.Linear(64, 1024)), nn.ModuleList()
optimizers = [torch.optim.AdamW([model[0].weight]), torch.optim.AdamW([model[1].weight])]
if os.environ["HEADS"] == "on":
    optimizers.GROW
for i in range(9000):
    piece = text[i * 1024 : (i + 1) * 1024 + 1]
    F.cross_entropy(model(piece[:-1]), piece[1:]).backward()
    for each in optimizers:
        each.step()
print("final val_loss", F.cross_entropy(model(held[:-1]), held[1:]).item())
"""


@pytest.mark.parametrize(
    "grow",
    ["insert(1, torch.optim.Adam(heads.parameters()))", "append(torch.optim.Adam(heads.parameters()))", "pop()"],
)
def test_a_list_that_grows_or_shrinks_on_one_way_alone_keeps_what_it_holds(grow: str) -> None:
    updates = trace_of(GROWN.replace("GROW", grow)).updates
    assert any(update.how == "gradient" and any(tok.data == "train" for tok in update.learned) for update in updates)


def test_a_training_that_is_not_followed_is_not_called_clean() -> None:
    lost = GROWN.replace("for each in optimizers:\n        each.step()", "apply(*map(type(model).step_of, optimizers))")
    assert findings(lost)["validation-in-training"].verdict == "cannot tell"
    assert findings(GROWN)["validation-in-training"].verdict == "clean"
