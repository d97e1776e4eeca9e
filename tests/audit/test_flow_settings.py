"""Numbers out of a table of settings are no places in the data; windows that end where the next turn begins; passes
that are repeated with what was made before them."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.flow.events import Clock
from tests.audit.order import HEAD, HONEST, MAIN, broken, doubted, findings, line_of, trace_of

EVAL = "    final = eval_ttt(args, model, val)\n"
SPEC = """
SPEC = {"depth": 4, "first": 1, "chunk": 32768, "rate": 0.1, "seq_len": 1024, "look": 65536, "last": 3}
ROWS = [("DEPTH", int, 4), ("CHUNK", int, 32768), ("RATE", float, 0.1), ("SEQ_LEN", int, 1024), ("LOOK", int, 65536)]
class Settings: pass
def settled():
    made = Settings()
    FILLED
    return made
S = settled()
"""
TABLES = {
    "a table": "for key, default in SPEC.items(): setattr(made, key, type(default)(os.environ.get(key.upper(), default)))",
    "rows": "for name, kind, default in ROWS: setattr(made, name.lower(), kind(os.environ.get(name, default)))",
}
LOOKED = """
    def looked(heat):
        model.temperature = heat
        total = count = 0
        for i in range(0, val.numel() - 1, S.look):
            total += model(val[i : i + S.look][None], val[i + 1 : i + S.look + 1][None]).item() * S.look
            count += S.look
        return total / count
    model.temperature = CHOSEN
    total = count = 0
    with torch.no_grad():
        for lo in range(0, val.numel() - 1, S.chunk):
            hi = min(lo + S.chunk, val.numel() - 1)
            total += model(val[lo:hi][None], val[lo + 1 : hi + 1][None]).item() * (hi - lo)
            count += hi - lo
    final = total / count
"""


def script(body: str, table: str = "a table") -> str:
    head = HEAD.replace("return self.head(self.hidden(x))", "return self.head(self.hidden(x)) / self.temperature")
    return head + SPEC.replace("FILLED", TABLES[table]) + MAIN.replace(EVAL, body)


@pytest.mark.parametrize("table", TABLES)
def test_two_settings_of_one_table_keep_no_tokens_apart(table: str) -> None:
    chosen = script(LOOKED.replace("CHOSEN", "min((0.9, 1.0, 1.1), key=looked)"), table)
    assert "temperature-from-validation" in broken(chosen)
    assert doubted(script(LOOKED.replace("CHOSEN", "0.98"), table)) == set()


CHUNKED = """
    opt = torch.optim.SGD(model.parameters(), lr=S.rate)
    total = count = 0
    for lo in range(0, val.numel() - 1, S.chunk):
        hi = min(lo + S.chunk, val.numel() - 1)
        w0 = max(0, hi - 2 * S.chunk)
        x, y = val[w0:hi][None], val[w0 + 1 : hi + 1][None]
        nll = F.cross_entropy(model.forward_logits(x)[0, lo - w0 :], y[0, lo - w0 :], reduction="none")
        BEFORE
        total += nll.sum().item()
        count += hi - lo
        AFTER
    final = total / count
"""
TAUGHT = "nll.mean().backward(); opt.step(); opt.zero_grad()"
AGAIN = (
    TAUGHT + "\n        nll = F.cross_entropy(model.forward_logits(x)[0, lo - w0 :], y[0, lo - w0 :], reduction='none')"
)


@pytest.mark.parametrize("table", TABLES)
def test_a_window_up_to_where_the_next_turn_begins_is_of_this_turn(table: str) -> None:
    honest = CHUNKED.replace("BEFORE", "pass").replace("AFTER", TAUGHT)
    assert doubted(script(honest, table)) == set()
    first = script(CHUNKED.replace("BEFORE", AGAIN).replace("AFTER", "pass"), table)
    assert broken(first) & {"training-before-scoring", "rescoring-after-adaptation"}


ADAPTED = """
    class Low:
        def __init__(self):
            self.a, self.b = torch.randn(64, 4, requires_grad=True), torch.zeros(4, 64, requires_grad=True)
            self.opt = torch.optim.Adam([self.a, self.b], lr=0.01)
        def __call__(self, h): return h + h @ self.a @ self.b
        def learn(self, loss):
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
    total = count = 0
    for at in range(0, val.numel() - 1, 65536):
        low = Low()
        PASSES
            for lo in range(at, at + 65536, 1024):
                h = model.hidden(val[lo : lo + 1024][None]).detach()
                nll = F.cross_entropy(model.head(low(h))[0], val[lo + 1 : lo + 1025], reduction="none")
                if LAST:
                    total += nll.sum().item()
                    count += 1024
                low.learn(nll.mean())
    final = total / count
"""
REPEATED = {"a flag": ("for last in (False, True):", "last"), "a count": ("for turn in range(3):", "turn == 2")}


@pytest.mark.parametrize("how", REPEATED.values(), ids=REPEATED)
def test_adapters_that_learned_in_an_earlier_pass_are_no_slot(how: tuple[str, str]) -> None:
    accused = broken(script(ADAPTED.replace("PASSES", how[0]).replace("LAST", how[1])))
    assert accused & {"multi-epoch-last", "rescoring-after-adaptation", "training-before-scoring"}
    assert "slot-on-scored" not in accused
    assert doubted(script(ADAPTED.replace("PASSES", "if True:").replace("LAST", "True"))) == set()


def test_a_step_taken_by_a_helper_is_shown_where_the_loss_is_made() -> None:
    body = ADAPTED.replace("PASSES", "if True:").replace("LAST", "True")
    steps = "                for _ in range(4):\n                    own = F.cross_entropy(model.head(low(h))[0], GOAL)\n                    low.learn(own)\n"
    fitted = body.replace(
        "                nll = F", steps.replace("GOAL", "val[lo + 1 : lo + 1025]") + "                nll = F"
    )
    text = script(
        fitted.replace("                low.learn(nll.mean())\n", "")
        .replace("        low = Low()\n", "")
        .replace("                h = model", "                low = Low()\n                h = model")
    )
    finding = findings(text)["slot-on-scored"]
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert abs(finding.place.line - line_of(text, "                    own = F")) <= 1
    assert doubted(HONEST) == set()


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
