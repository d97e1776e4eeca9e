"""What a forward hook answers stands in the place of what its module gave, until the hook is taken off."""

from tests.audit.order import HEAD, broken, doubted
from tests.audit.test_flow_language import CHUNKS, WALK

ADAPTED = """
class Adapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width))
    def extra(self, part, args, out):
        return out + self.delta
def walk(args, model, val):
    model.requires_grad_(False)
    adapter = Adapter(1024)
    handle = HOOKED
    opt = torch.optim.SGD([adapter.delta], lr=1e-3)
    total, count = 0.0, 0
CHUNKS        ONE
        TWO
        count += 1024
    return total / count
""".replace("CHUNKS", CHUNKS)
SCORE = "total += model(x, y).detach().item() * 1024"
LEARN = "opt.zero_grad(); model(x, y).backward(); opt.step()"
FOUND = {"training-before-scoring", "slot-on-scored"}


def script(one: str, two: str, hooked: str = "model.head.register_forward_hook(adapter.extra)") -> str:
    return HEAD + ADAPTED.replace("ONE", one).replace("TWO", two).replace("HOOKED", hooked) + WALK


def test_an_adapter_in_a_hook_learns_after_it_scored() -> None:
    assert doubted(script(SCORE, LEARN)) == set()


def test_an_adapter_in_a_hook_that_learns_first_is_found() -> None:
    assert broken(script(LEARN, SCORE)) & FOUND
    part = "model.head.register_forward_hook(functools.partial(Adapter.extra, adapter))"
    assert broken(script(LEARN, SCORE, part)) & FOUND


def test_an_adapter_that_was_taken_off_scores_nothing() -> None:
    assert doubted(script(LEARN, f"handle.remove(); {SCORE}")) == set()


def test_a_hook_that_answers_nothing_leaves_the_output_as_it_is() -> None:
    watching = script(LEARN, SCORE).replace("return out + self.delta", "self.seen = out.detach()")
    assert doubted(watching) == set()
