"""A `with` does first what its manager does on the way in, then its body, then what stands behind the yield."""

import pytest

from tests.audit.order import HEAD, broken, doubted
from tests.audit.test_flow_language import CHUNKS, WALK

LENT = """
import contextlib
class Adapters(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = [model]
        self.deltas = {name: nn.Parameter(torch.zeros(1024)) for name, part in model.named_modules()}
    def extra(self, name, part, args, out):
        return out + self.deltas[name]
    def on(self):
        parts = self.model[0].named_modules()
        return [part.register_forward_hook(functools.partial(self.extra, name)) for name, part in parts]
    MANAGER
def study(model, x, y):
    adapters = Adapters(model)
    opt = torch.optim.SGD(list(adapters.deltas.values()), lr=1e-3)
    nats = 0.0
    with adapters.attached():
        for s in range(0, 1024, 128):
            a, b = x[:, s : s + 128], y[0, s : s + 128]
            ONE
            TWO
    return nats
def walk(args, model, val):
    model.requires_grad_(False)
    total, count = 0.0, 0
    parts = [val[s : s + 1025][None] for s in range(0, val.numel() - 1024, 1024)]
    while (number := claim()) < len(parts):
        total += study(model, parts[number][:, :-1], parts[number][:, 1:])
        count += 1024
    return total / count
def claim():
    with open("claims.txt", "r+") as file:
        return int(file.read())
"""
BY_YIELD = """@contextlib.contextmanager
    def attached(self):
        hooks = self.on()
        try:
            yield
        finally:
            LEAVE
"""
BY_CLASS = """def attached(self):
        return self
    def __enter__(self):
        self.hooks = self.on()
    def __exit__(self, *caught):
        hooks = self.hooks
        LEAVE
"""
SCORE = "nats += F.cross_entropy(model.forward_logits(a)[0], b, reduction='none').detach().sum()"
LEARN = "opt.zero_grad(); F.cross_entropy(model.forward_logits(a)[0], b).backward(); opt.step()"
OFF = "for hook in hooks: hook.remove()"


def lent(manager: str, one: str, two: str, leave: str = OFF) -> str:
    own = manager.replace("LEAVE", leave)
    return HEAD + LENT.replace("MANAGER", own).replace("ONE", one).replace("TWO", two) + WALK


@pytest.mark.parametrize("manager", [BY_YIELD, BY_CLASS], ids=["yield", "class"])
def test_adapters_that_are_taken_off_again_do_not_reach_the_next_documents(manager: str) -> None:
    assert doubted(lent(manager, SCORE, LEARN)) == set()


@pytest.mark.parametrize("manager", [BY_YIELD, BY_CLASS], ids=["yield", "class"])
def test_inside_the_with_the_adapters_are_on(manager: str) -> None:
    assert broken(lent(manager, LEARN, SCORE))


SWAPPED = """
import contextlib
@contextlib.contextmanager
def swapped(model):
    kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
    yield model
    LEAVE
def walk(args, model, val):
    total, count = 0.0, 0
CHUNKS        with swapped(model) as net:
            opt = torch.optim.SGD(net.parameters(), lr=1e-3)
            opt.zero_grad()
            net(x, y).backward()
            opt.step()
        total += model(x, y).detach().item() * 1024
        count += 1024
    return total / count
""".replace("CHUNKS", CHUNKS)


def test_what_stands_behind_the_yield_is_done_after_the_body() -> None:
    restored = HEAD + SWAPPED.replace("LEAVE", "model.load_state_dict(kept)") + WALK
    assert doubted(restored) == set()
    assert broken(HEAD + SWAPPED.replace("LEAVE", "pass") + WALK)


def test_a_return_inside_a_with_leaves_the_function() -> None:
    early = SWAPPED.replace(
        "            opt = torch", "            return net(x, y).detach().item()\n            opt = torch"
    )
    assert doubted(HEAD + early.replace("LEAVE", "model.load_state_dict(kept)") + WALK) == set()


NARRATED = """
import itertools
def narrated(verb):
    def wrap(method):
        @functools.wraps(method)
        def told(self, *args):
            begin = time.perf_counter()
            result = method(self, *args)
            print(f"{verb}: {time.perf_counter() - begin:.1f}s")
            return result
        return told
    return wrap
class Vault:
    @narrated("listening")
    def listen(self, model, stream):
        rows = itertools.chain.from_iterable(x for x, _ in stream)
        heard = {}
        for row in itertools.islice(rows, 8):
            h = model.hidden(row[None]).reshape(-1, 64).detach()
            heard["head"] = heard.get("head", torch.zeros(64, 64)).addmm_(h.T, h)
        return heard
def margins(val):
    for chunk in itertools.cycle(val[: 64 * 1024].split(8 * 1024)):
        yield chunk.view(8, 1024), chunk.view(8, 1024)
def walk(args, model, val):
    stream = iter(functools.partial(next, margins(FROM)), None)
    heard = Vault().listen(model, stream)
    with torch.no_grad():
        model.head.weight.copy_(torch.linalg.solve(heard["head"], model.head.weight.T).T)
    return eval_val(args, model, val)
"""


def test_a_method_under_wraps_and_an_iterator_of_calls_are_followed() -> None:
    assert broken(HEAD + NARRATED.replace("FROM", "val") + WALK) == {"calibration-on-validation"}
    trained = HEAD + NARRATED.replace("FROM", "load(args.train_files)") + WALK
    assert doubted(trained) <= {"calibration-after-cap"}
