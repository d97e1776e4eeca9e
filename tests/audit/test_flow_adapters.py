"""What `with` puts on and takes off again, decorators that only rename, and fields that are made for each instance."""

from fairway.audit.flow.events import Clock
from tests.audit.order import HEAD, broken, doubted, trace_of
from tests.audit.test_flow_language import CHUNKS, WALK

ATTACHED = """
import contextlib
class Adapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width))
    def extra(self, part, args, out):
        return out + self.delta
    @contextlib.contextmanager
    def on(self, *modules):
        handles = [module.register_forward_hook(self.extra) for module in modules]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
def walk(args, model, val):
    model.requires_grad_(False)
    adapter = Adapter(1024)
    opt = torch.optim.SGD([adapter.delta], lr=1e-3)
    total, count = 0.0, 0
CHUNKS        ONE
        TWO
        count += 1024
    return total / count
""".replace("CHUNKS", CHUNKS)
SCORE = "total += model(x, y).detach().item() * 1024"
LEARN = "with adapter.on(model.head): opt.zero_grad(); model(x, y).backward(); opt.step()"


def script(one: str, two: str) -> str:
    return HEAD + ATTACHED.replace("ONE", one).replace("TWO", two) + WALK


def test_what_a_context_puts_on_works_inside_it() -> None:
    inside = f"with adapter.on(model.head): {SCORE}"
    assert broken(script(LEARN, inside)) & {"training-before-scoring", "slot-on-scored"}
    assert doubted(script(inside, LEARN)) == set()


def test_what_a_context_puts_on_is_taken_off_behind_it() -> None:
    assert doubted(script(LEARN, SCORE)) == set()


def test_a_decorator_that_only_takes_a_name_over_leaves_the_method_as_it_is() -> None:
    told = """
def told(word):
    def wrap(method):
        @functools.wraps(method)
        def inner(*args):
            print(word)
            return method(*args)
        return inner
    return wrap
@told("walk")
def walk"""
    text = script(LEARN, f"with adapter.on(model.head): {SCORE}").replace("\ndef walk", told)
    assert broken(text) & {"training-before-scoring", "slot-on-scored"}


NESTED = """
import time
from dataclasses import dataclass, field
@dataclass
class Recipe:
    seconds: float = 600.0
    reserve: float = 14.0
@dataclass
class Job:
    recipe: Recipe = field(default_factory=Recipe)
    seeds: list = field(default_factory=lambda: [1, 2])
job, begin = Job(), time.perf_counter()
while True:
    if time.perf_counter() - begin > job.recipe.seconds - job.recipe.reserve:
        break
"""


def test_a_field_has_what_its_factory_makes() -> None:
    clocks = [event for event in trace_of(NESTED).events if isinstance(event, Clock)]
    assert {clock.limit for clock in clocks} == {586.0}
