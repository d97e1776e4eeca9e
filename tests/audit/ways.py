"""The same sum in many ways: how scripts carry losses and bytes from a loop to the score that they print.

Each way uses price(net, x, y) for losses, octets_of(x, y) for bytes and pieces(tokens) for contexts with targets.
"""

HELPERS = """
import collections, contextlib, dataclasses, functools, itertools, json, logging, operator, sys, time, asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch.distributed as dist

def price(net, x, y):
    logits = net(torch.from_numpy(x)).float()
    nll = F.cross_entropy(logits, torch.from_numpy(y), reduction="none")
    {fault}
    return nll

NET = Net()
TABLES = tables()

def octets_of(x, y):
    size, lead, edge = TABLES
    return {count}

def all_tokens():
    return np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])

def pieces(tokens):
    for at in range(0, len(tokens) - 1, 512):
        yield tokens[at : at + 513][:-1], tokens[at : at + 513][1:]
"""

WAYS = {
    "dict-threaded": """
def book(state, x, y):
    state["nats"] += price(NET, x, y).sum().item()
    state["octets"] += octets_of(x, y)
    return state
def walk(state):
    for x, y in pieces(all_tokens()):
        state = book(state, x, y)
    return state
s = walk({"nats": 0.0, "octets": 0.0})
print(f"val_bpb:{s['nats'] / s['octets'] / math.log(2):.4f}")
""",
    "dict-new-each": """
def book(state, x, y):
    return {**state, "nats": state["nats"] + price(NET, x, y).sum().item(), "octets": state["octets"] + octets_of(x, y)}
s = dict(nats=0.0, octets=0.0)
for x, y in pieces(all_tokens()):
    s = book(s, x, y)
print(f"val_bpb:{s['nats'] / s['octets'] / math.log(2):.4f}")
""",
    "stacked-and-unpacked": """
nats, octets = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).double().sum()
    octets += octets_of(x, y)
sums = torch.stack((nats, octets))
if dist.is_available() and dist.is_initialized():
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
n, o = (float(v) for v in sums)
print(f"val_bpb:{n / o / math.log(2):.4f}")
""",
    "rows-of-sums": """
rows = torch.zeros(100, 2, dtype=torch.float64)
for n, (x, y) in enumerate(pieces(all_tokens())):
    rows[n % 100, 0] += price(NET, x, y).double().sum()
    rows[n % 100, 1] += octets_of(x, y)
s = rows.sum(dim=0).tolist()
print(f"val_bpb:{s[0] / s[1] / math.log(2):.4f}")
""",
    "packed": """
stats = torch.zeros(3, dtype=torch.float64)
for x, y in pieces(all_tokens()):
    stats[0] += price(NET, x, y).double().sum()
    stats[1] += octets_of(x, y)
    stats[2] += len(y)
dist.all_reduce(stats, op=dist.ReduceOp.SUM)
nats, octets, count = stats.tolist()
print("val_bpb", nats / math.log(2) / octets)
""",
    "packed-stack": """
nats = torch.zeros((), dtype=torch.float64)
octets = torch.zeros((), dtype=torch.float64)
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).double().sum()
    octets += octets_of(x, y)
both = torch.stack([nats, octets])
if dist.is_available() and dist.is_initialized():
    dist.all_reduce(both)
print("val_bpb", (both[0] / both[1]).item() / math.log(2))
""",
    "packed-tensor-unpack": """
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).sum().item()
    octets += float(octets_of(x, y))
t = torch.tensor([nats, octets], device="cuda", dtype=torch.float64)
dist.all_reduce(t)
nats, octets = (v.item() for v in t)
print("val_bpb", nats / math.log(2) / octets)
""",
    "all-gather": """
mine = torch.zeros(2, dtype=torch.float64)
for x, y in pieces(all_tokens()):
    mine += torch.tensor([price(NET, x, y).sum().item(), float(octets_of(x, y))])
world = int(os.environ.get("WORLD_SIZE", 1))
parts = [torch.zeros_like(mine) for _ in range(world)]
dist.all_gather(parts, mine)
total = torch.stack(parts).sum(0)
print("val_bpb", float(total[0] / total[1]) / math.log(2))
""",
    "generator-zip-sum": """
def terms():
    for x, y in pieces(all_tokens()):
        yield price(NET, x, y).sum().item(), float(octets_of(x, y))
nats, octets = (sum(column) for column in zip(*terms()))
print("val_bpb", nats / math.log(2) / octets)
""",
    "reduce-tuple": """
def both(acc, pair):
    x, y = pair
    return acc[0] + price(NET, x, y).sum().item(), acc[1] + octets_of(x, y)
nats, octets = functools.reduce(both, pieces(all_tokens()), (0.0, 0))
print("val_bpb", nats / math.log(2) / octets)
""",
    "dataclass-iadd": """
@dataclasses.dataclass
class Tally:
    nats: float = 0.0
    octets: float = 0.0
    def __iadd__(self, other):
        self.nats += other.nats
        self.octets += other.octets
        return self
    @property
    def bpb(self):
        return self.nats / math.log(2) / self.octets
tally = Tally()
for x, y in pieces(all_tokens()):
    tally += Tally(price(NET, x, y).sum().item(), octets_of(x, y))
print(f"val_bpb {tally.bpb:.5f}")
""",
    "dataclass-add": """
@dataclasses.dataclass(frozen=True)
class Tally:
    nats: float = 0.0
    octets: float = 0.0
    def __add__(self, other):
        return Tally(self.nats + other.nats, self.octets + other.octets)
    def __radd__(self, other):
        return self if other == 0 else self + other
total = sum((Tally(price(NET, x, y).sum().item(), octets_of(x, y)) for x, y in pieces(all_tokens())), Tally())
print(f"val_bpb {total.nats / total.octets / math.log(2):.5f}")
""",
    "dataclass-replace": """
@dataclasses.dataclass(frozen=True)
class Tally:
    nats: float = 0.0
    octets: float = 0.0
t = Tally()
for x, y in pieces(all_tokens()):
    t = dataclasses.replace(t, nats=t.nats + price(NET, x, y).sum().item(), octets=t.octets + octets_of(x, y))
print(f"val_bpb {t.nats / t.octets / math.log(2):.5f}")
""",
    "namedtuple-asdict": """
from typing import NamedTuple
class Result(NamedTuple):
    val_bpb: float
    targets: int
def report(**fields):
    print(json.dumps({"event": "evaluated", **fields}))
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).sum().item()
    octets += octets_of(x, y)
result = Result(nats / octets / math.log(2), len(all_tokens()) - 1)
report(**result._asdict())
""",
    "namedtuple": """
Sum = collections.namedtuple("Sum", "nats octets")
s = Sum(0.0, 0.0)
for x, y in pieces(all_tokens()):
    s = s._replace(nats=s.nats + price(NET, x, y).sum().item(), octets=s.octets + octets_of(x, y))
print(f"val_bpb {s.nats / s.octets / math.log(2):.5f}")
""",
    "walrus": """
source = pieces(all_tokens())
nats = octets = 0.0
while (pair := next(source, None)) is not None:
    nats += (nll := price(NET, *pair)).sum().item()
    octets += octets_of(*pair)
print(f"{nats / math.log(2) / octets = }")
""",
    "log-helper-kwargs": """
def log(**fields):
    line = " ".join(f"{k}:{v:.4f}" if isinstance(v, float) else f"{k}:{v}" for k, v in fields.items())
    print(line)
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).sum().item()
    octets += octets_of(x, y)
log(step=0, val_bpb=nats / math.log(2) / octets)
""",
    "json-dump": """
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    nats += price(NET, x, y).sum().item()
    octets += octets_of(x, y)
results = {"seed": 1}
results.update(val_bpb=nats / math.log(2) / octets)
results["loss"] = nats
with open("results.json", "w") as f:
    json.dump(results, f)
""",
    "own-decorator": """
def timed(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        t = time.time()
        out = function(*args, **kwargs)
        print("took", time.time() - t)
        return out
    return inner
@timed
@torch.no_grad()
def evaluate(net, *, verbose=False):
    nats = octets = 0.0
    for x, y in pieces(all_tokens()):
        nats += price(net, x, y).sum().item()
        octets += octets_of(x, y)
    return nats / math.log(2) / octets
print(f"val_bpb {evaluate(NET, verbose=True):.4f}")
""",
    "registry-dict": """
EVALS = {}
def register(name):
    def inner(function):
        EVALS[name] = function
        return function
    return inner
@register("plain")
def evaluate(net):
    nats = octets = 0.0
    for x, y in pieces(all_tokens()):
        nats += price(net, x, y).sum().item()
        octets += octets_of(x, y)
    return nats / math.log(2) / octets
mode = os.environ.get("MODE", "plain")
print(f"val_bpb {EVALS[mode](NET):.4f}")
""",
    "registry-method-class": """
class Registry:
    def __init__(self):
        self.table = {}
    def __call__(self, name):
        return lambda cls: self.table.setdefault(name, cls) or cls
    def make(self, name, *args):
        return self.table[name](*args)
registry = Registry()
@registry("plain")
class Plain:
    def __init__(self, net):
        self.net, self.nats, self.octets = net, 0.0, 0.0
    def run(self):
        for x, y in pieces(all_tokens()):
            self.nats += price(self.net, x, y).sum().item()
            self.octets += octets_of(x, y)
        return self
    @property
    def bpb(self):
        return self.nats / math.log(2) / self.octets
print(f"val_bpb {registry.make('plain', NET).run().bpb:.4f}")
""",
    "contextmanager": """
@contextlib.contextmanager
def scoring(net):
    net.eval()
    state = types_ = {"nats": 0.0, "octets": 0.0}
    try:
        yield state
    finally:
        net.train()
        print(f"val_bpb {state['nats'] / state['octets'] / math.log(2)}")
with scoring(NET) as state:
    for x, y in pieces(all_tokens()):
        state["nats"] += price(NET, x, y).sum().item()
        state["octets"] += octets_of(x, y)
print(f"val_bpb {state['nats'] / state['octets'] / math.log(2)}")
""",
    "buffer-numpy": """
tokens = all_tokens()
losses, sizes = np.zeros(len(tokens) - 1), np.zeros(len(tokens) - 1)
for at in range(0, len(tokens) - 1, 512):
    piece = tokens[at : at + 513]
    x, y = piece[:-1], piece[1:]
    losses[at : at + len(y)] = price(NET, x, y).cpu().numpy()
    sizes[at : at + len(y)] = octets_of(x, y)
print("val_bpb", losses.sum() / np.log(2) / sizes.sum())
""",
    "list-cat": """
found, sizes = [], []
for x, y in pieces(all_tokens()):
    found.append(price(NET, x, y).cpu())
    sizes.append(octets_of(x, y))
print("val_bpb", torch.cat(found).double().mean().item() / math.log(2) * sum(len(f) for f in found) / sum(sizes))
""",
    "closure": """
def ledger():
    nats = octets = 0.0
    def book(x, y):
        nonlocal nats, octets
        nats += price(NET, x, y).sum().item()
        octets += octets_of(x, y)
    def result():
        return nats / math.log(2) / octets
    return book, result
book, result = ledger()
for x, y in pieces(all_tokens()):
    book(x, y)
print("val_bpb", result())
""",
    "template-method": """
class Base:
    def __init__(self, net):
        self.net = net
        self.reset()
    def reset(self):
        self.totals = collections.defaultdict(float)
    def step(self, x, y):
        raise NotImplementedError
    def run(self):
        for x, y in pieces(all_tokens()):
            for key, value in self.step(x, y).items():
                self.totals[key] += value
        return self.totals
class Plain(Base):
    def step(self, x, y):
        return {"nats": price(self.net, x, y).sum().item(), "octets": octets_of(x, y)}
t = Plain(NET).run()
print("val_bpb", t["nats"] / math.log(2) / t["octets"])
""",
    "counter-update": """
t = collections.Counter()
for x, y in pieces(all_tokens()):
    t.update(nats=price(NET, x, y).sum().item(), octets=int(octets_of(x, y)))
print("val_bpb", t["nats"] / math.log(2) / t["octets"])
""",
    "meter": """
class Meter:
    def __init__(self):
        self.sum = 0.0
        self.n = 0
    def update(self, value, n=1):
        self.sum += value * n
        self.n += n
    @property
    def avg(self):
        return self.sum / max(self.n, 1)
loss_meter, octets = Meter(), 0
for x, y in pieces(all_tokens()):
    loss_meter.update(price(NET, x, y).mean().item(), len(y))
    octets += octets_of(x, y)
tokens_per_byte = loss_meter.n / octets
print("val_bpb", loss_meter.avg / math.log(2) * tokens_per_byte)
""",
    "executor-submit": """
from concurrent.futures import as_completed
def one(x, y):
    return price(NET, x, y).sum().item(), octets_of(x, y)
nats = octets = 0.0
with ThreadPoolExecutor(4) as pool:
    futures = [pool.submit(one, x, y) for x, y in pieces(all_tokens())]
    for future in as_completed(futures):
        n, o = future.result()
        nats += n
        octets += o
print("val_bpb", nats / math.log(2) / octets)
""",
    "async": """
async def one(x, y):
    return price(NET, x, y).sum().item(), octets_of(x, y)
async def main():
    nats = octets = 0.0
    for x, y in pieces(all_tokens()):
        n, o = await one(x, y)
        nats += n
        octets += o
    return nats / math.log(2) / octets
print("val_bpb", asyncio.run(main()))
""",
    "queue": """
import queue, threading
q = queue.Queue()
def producer():
    for x, y in pieces(all_tokens()):
        q.put((price(NET, x, y).sum().item(), octets_of(x, y)))
    q.put(None)
threading.Thread(target=producer).start()
nats = octets = 0.0
while True:
    got = q.get()
    if got is None:
        break
    nats += got[0]
    octets += got[1]
print("val_bpb", nats / math.log(2) / octets)
""",
    "model-returns-loss": """
class WithLoss(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, ids, targets=None, reduction="mean"):
        if targets is None:
            return self.net(ids)
        return price(self.net, ids.numpy(), targets.numpy()).mean()
model = torch.compile(WithLoss(NET), dynamic=False, fullgraph=True)
ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0]) if dist.is_initialized() else model
total, octets, count = torch.zeros(()), 0, 0
for x, y in pieces(all_tokens()):
    total += ddp(torch.from_numpy(x), torch.from_numpy(y)).detach() * len(y)
    octets += octets_of(x, y)
    count += len(y)
mean = (total / count).item()
print("val_bpb", mean / math.log(2.0) * (count / octets))
""",
    "torch-log2": """
nats, octets = torch.tensor(0.0), torch.tensor(0.0)
for x, y in pieces(all_tokens()):
    nats = torch.add(nats, price(NET, x, y).sum())
    octets = octets.add(octets_of(x, y))
print("val_bpb", torch.div(nats, torch.log(torch.tensor(2.0))).div(octets).item())
""",
    "value-and-grad": """
def loss_of(params, x, y):
    return price(lambda ids: torch.func.functional_call(NET, params, (ids,)), x, y).sum()
step = torch.func.grad_and_value(loss_of)
params = dict(NET.named_parameters())
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    grads, value = step(params, x, y)
    nats += value.item()
    octets += octets_of(x, y)
print("val_bpb", nats / math.log(2) / octets)
""",
    "history-rows": """
rows = []
for x, y in pieces(all_tokens()):
    rows.append({"nats": price(NET, x, y).sum().item(), "octets": float(octets_of(x, y))})
total = {k: sum(r[k] for r in rows) for k in ("nats", "octets")}
print("val_bpb", total["nats"] / math.log(2) / total["octets"])
""",
    "attribute-on-function": """
def evaluate():
    evaluate.nats = 0.0
    evaluate.octets = 0.0
    for x, y in pieces(all_tokens()):
        evaluate.nats += price(NET, x, y).sum().item()
        evaluate.octets += octets_of(x, y)
evaluate()
print("val_bpb", evaluate.nats / math.log(2) / evaluate.octets)
""",
    "typer": """
import typer
app = typer.Typer()
@app.command()
def main(steps: int = 10):
    nats = octets = 0.0
    for x, y in pieces(all_tokens()):
        nats += price(NET, x, y).sum().item()
        octets += octets_of(x, y)
    print("val_bpb", nats / math.log(2) / octets)
app()
""",
    "dataloader": """
class Pieces(torch.utils.data.Dataset):
    def __init__(self, tokens):
        self.tokens = tokens
    def __len__(self):
        return (len(self.tokens) - 1) // 512
    def __getitem__(self, i):
        piece = self.tokens[i * 512 : i * 512 + 513]
        return piece[:-1], piece[1:]
nats = octets = 0.0
for x, y in torch.utils.data.DataLoader(Pieces(all_tokens()), batch_size=None):
    nats += price(NET, x, y).sum().item()
    octets += octets_of(x, y)
print("val_bpb", nats / math.log(2) / octets)
""",
    "iter-class": """
class Pieces:
    def __init__(self, tokens):
        self.tokens, self.at = tokens, 0
    def __iter__(self):
        return self
    def __next__(self):
        if self.at >= len(self.tokens) - 1:
            raise StopIteration
        piece = self.tokens[self.at : self.at + 513]
        self.at += 512
        return piece[:-1], piece[1:]
nats = octets = 0.0
for x, y in Pieces(all_tokens()):
    nats += price(NET, x, y).sum().item()
    octets += octets_of(x, y)
print("val_bpb", nats / math.log(2) / octets)
""",
    "enter-exit-sum": """
class Books:
    def __enter__(self):
        self.nats = self.octets = 0.0
        return self
    def add(self, x, y):
        self.nats += price(NET, x, y).sum().item()
        self.octets += octets_of(x, y)
    def __exit__(self, *_):
        print("val_bpb", self.nats / math.log(2) / self.octets)
with Books() as books:
    for x, y in pieces(all_tokens()):
        books.add(x, y)
""",
    "star-result": """
def run():
    nats = octets = count = 0.0
    for x, y in pieces(all_tokens()):
        nats += price(NET, x, y).sum().item()
        octets += octets_of(x, y)
        count += len(y)
    return nats, octets, count
first, *rest = run()
def say(nats, octets, count):
    print("val_bpb", nats / math.log(2) / octets)
say(first, *rest)
say(*run())
""",
    "vars-namespace": """
from types import SimpleNamespace
s = SimpleNamespace(nats=0.0, octets=0.0)
for x, y in pieces(all_tokens()):
    s.nats += price(NET, x, y).sum().item()
    s.octets += octets_of(x, y)
print("val_bpb", vars(s)["nats"] / math.log(2) / s.__dict__["octets"])
""",
    "rows-changed-in-place": """
def weighed(rows, kept):
    for row, keep in zip(kept, rows):
        for j, k in enumerate(keep):
            row[j] = k
    return torch.tensor(kept)
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    rows = price(NET, x, y).view(1, -1).tolist()
    nats += weighed(rows, torch.ones(1, len(y)).tolist()).sum().item()
    octets += octets_of(x, y)
print("val_bpb", nats / math.log(2) / octets)
""",
    "rows-changed-under-numbers": """
nats = octets = 0.0
for x, y in pieces(all_tokens()):
    rows = [None]
    rows[0] = price(NET, x, y).view(1, -1)
    held = torch.zeros(1, len(y)).tolist()
    for number, row in enumerate(held):
        row[:] = rows[number][0].tolist()
    nats += torch.tensor(held).sum().item()
    octets += octets_of(x, y)
print("val_bpb", nats / math.log(2) / octets)
""",
}
