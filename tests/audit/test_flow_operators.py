"""The walk follows operators that are called by a name, attributes made by a call, and operators of the script's own
classes: each once honest and once the other way."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from tests.audit.order import HEAD, HONEST, MAIN, broken, doubted, trace_of

TRAIN = "    train(args, model)\n"
EVAL = "    final = eval_ttt(args, model, val)\n"

# Second moments of what enters each matrix, kept by STORE, over batches of READ; the weights follow from them.
CALIBRATED = (
    HEAD.replace("    flag = bool", "EXTRA    flag = bool")
    + """
import operator
def calibrate(args, model):
    sums, hooks = {}, []
    def look(name):
        return lambda module, given, out: STORE
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(look(name + ".weight")))
    loader = Loader(args.READ)
    with torch.no_grad():
        for _ in range(8):
            x, y = loader.next(65536)
            model(x, y)
    for hook in hooks:
        hook.remove()
    state = model.state_dict()
    for name, moment in sums.items():
        state[name] = state[name] @ torch.linalg.cholesky(moment)
    model.load_state_dict(state)
"""
    + MAIN.replace(TRAIN, TRAIN + "    calibrate(args, model)\n")
)
GRAM = "(given[0].flatten(0, -2).T @ given[0].flatten(0, -2)).float()"
STORES = {
    "a dict's own method": f"sums.__setitem__(name, sums.get(name, 0) + {GRAM})",
    "the module operator": f"operator.setitem(sums, name, operator.add(sums.get(name, 0), {GRAM}))",
    "a method of the class": f"dict.update(sums, {{name: {GRAM}}})",
}


@pytest.mark.parametrize("store", STORES)
def test_what_a_named_operator_stores_is_followed(store: str) -> None:
    text = CALIBRATED.replace("STORE", STORES[store]).replace("EXTRA", "")
    assert "calibration-on-validation" not in doubted(text.replace("READ", "train_files"))
    assert broken(text.replace("READ", "val_files")) == {"calibration-on-validation"}


@pytest.mark.parametrize("made", ["property(lambda self: self.SOURCE)", "functools.cached_property(chosen)"])
def test_an_attribute_that_a_call_makes_is_computed_when_it_is_read(made: str) -> None:
    extra = f"    def chosen(self):\n        return self.SOURCE\n    calibration_files = {made}\n"
    text = CALIBRATED.replace("STORE", STORES["a dict's own method"]).replace("EXTRA", extra)
    text = text.replace("READ", "calibration_files")
    assert "calibration-on-validation" not in doubted(text.replace("SOURCE", "train_files"))
    assert broken(text.replace("SOURCE", "val_files")) == {"calibration-on-validation"}


BEST = (
    HEAD
    + """
import operator
from dataclasses import dataclass
@dataclass
class Score:
    loss: float
    epochs: int
def several(args, model, val):
    weights = copy.deepcopy(model.state_dict())
    scores = []
    for epochs in (1, 2, 3):
        model.load_state_dict(weights)
        args.epochs = epochs
        scores.append(Score(eval_ttt(args, model, val), epochs))
    return CHOICE
"""
    + MAIN.replace(EVAL, "    final = several(args, model, val).loss\n")
)
CHOICES = {
    "attrgetter": 'min(scores, key=operator.attrgetter("loss"))',
    "sorted by attrgetter": 'sorted(scores, key=operator.attrgetter("loss"))[0]',
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_getter_tells_by_what_a_score_is_chosen(choice: str) -> None:
    assert "min-over-passes" in broken(BEST.replace("CHOICE", CHOICES[choice]))
    honest = CHOICES[choice].replace('"loss"', '"epochs"')
    assert "min-over-passes" not in doubted(BEST.replace("CHOICE", honest))


LEDGER = (
    HEAD
    + """
class Ledger:
    def __init__(self, nats=0.0, tokens=0):
        self.nats, self.tokens = nats, tokens
    def __add__(self, other):
        return Ledger(self.nats + other.nats, self.tokens + other.tokens)
    def __iadd__(self, loss):
        self.nats, self.tokens = self.nats + loss.double().sum().item(), self.tokens + loss.numel()
        return self
def walk(args, model, val):
    opt, book = torch.optim.SGD(model.parameters(), lr=1e-3), Ledger()
    for s in range(0, val.numel() - 1024, 1024):
        x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]
        ONE
        TWO
    return book.nats / book.tokens
"""
    + MAIN.replace(EVAL, "    final = walk(args, model, val)\n")
)
LEARN = "opt.zero_grad(); model(x, y).backward(); opt.step()"
LOSSES = 'F.cross_entropy(model.forward_logits(x).view(-1, 1024), y.view(-1), reduction="none")'
BOOKS = {
    "in place": f"book += {LOSSES}",
    "a new one": f"book = book + Ledger({LOSSES}.double().sum().item(), 1024)",
}


@pytest.mark.parametrize("book", BOOKS)
def test_a_ledger_with_operators_of_its_own_is_followed(book: str) -> None:
    assert doubted(LEDGER.replace("ONE", BOOKS[book]).replace("TWO", LEARN)) == set()
    assert broken(LEDGER.replace("ONE", LEARN).replace("TWO", BOOKS[book])) == {"training-before-scoring"}


KEPT = (
    HEAD
    + """
class Book:
    def __init__(self, many):
        self.nats = torch.zeros(many)
        self.seen = torch.zeros(many, dtype=torch.uint8)
    def write(self, places, nats):
        self.nats[places] = nats.float()
        self.seen[places] += 1
    def parts(self, size=4096):
        for low in range(0, self.nats.numel(), size):
            yield slice(low, min(low + size, self.nats.numel()))
    def told(self):
        sums = torch.zeros(2, dtype=torch.float64)
        for part in self.parts():
            own = self.seen[part].bool()
            sums[0] += own.sum()
            sums[1] += self.nats[part][own].double().sum()
        count, nats = sums.tolist()
        return nats / count
def walk(args, model, val):
    opt, book = torch.optim.SGD(model.parameters(), lr=1e-3), Book(val.numel() - 1)
    for low in range(0, val.numel() - 1, args.chunk):
        high = min(low + args.chunk, val.numel() - 1)
        x, y = val[low:high][None], val[low + 1 : high + 1][None]
        BEFORE
        for s in range(low, high, 1024):
            places = torch.arange(s, min(s + 1024, high))
            logits = model.forward_logits(val[places][None])[0]
            book.write(places, F.cross_entropy(logits, val[places + 1], reduction="none"))
        AFTER
    return book.told()
"""
    + MAIN.replace(EVAL, "    final = walk(args, model, val)\n")
)


def test_a_part_of_a_ledger_knows_what_each_of_its_windows_knew() -> None:
    assert doubted(KEPT.replace("BEFORE", "pass").replace("AFTER", LEARN)) == set()
    assert broken(KEPT.replace("BEFORE", LEARN).replace("AFTER", "pass")) == {"training-before-scoring"}


COLUMNS = (
    HEAD
    + """
def walk(args, model, val):
    opt, blocks = torch.optim.SGD(model.parameters(), lr=1e-3), range(0, val.numel() - 1, args.chunk)
    rows = torch.zeros(len(blocks), 9)
    for b, low in enumerate(blocks):
        high = min(low + args.chunk, val.numel() - 1)
        x, y = val[low:high][None], val[low + 1 : high + 1][None]
        BEFORE
        for s in range(low, high, 1024):
            e = min(s + 1024, high)
            logits = model.forward_logits(val[s:e][None])[0]
            nll = F.cross_entropy(logits, val[s + 1 : e + 1], reduction="none")
            alone = torch.stack((EXPERTS), 1)
            rows[b, 0] += nll.double().sum()
            rows[b, 1] += nll.numel()
            rows[b, 2:] += alone.double().sum(0)
        AFTER
    nats, count = rows[:, :2].sum(0).tolist()
    return nats / count
"""
    + MAIN.replace(EVAL, "    final = walk(args, model, val)\n")
)
EXPERT = "F.cross_entropy(logits[:, :{}], val[s + 1 : e + 1], reduction='none')"


def test_the_columns_of_a_ledger_may_be_those_of_experts_alone() -> None:
    text = COLUMNS.replace("EXPERTS", ", ".join(EXPERT.format(1024 - at) for at in range(7)))
    assert doubted(text.replace("BEFORE", "pass").replace("AFTER", LEARN)) == set()
    assert broken(text.replace("BEFORE", LEARN).replace("AFTER", "pass")) == {"training-before-scoring"}


def test_named_operators_fold_as_the_written_ones() -> None:
    text = "import operator\na = operator.mul(3, operator.add(2, 5))\nb = operator.gt(a, 20)\nc = (3).__sub__(1)\nprint(a, b, c)\n"
    assert trace_of(text).unknowns() == []


TOLD = (
    HEAD
    + """
from dataclasses import dataclass
@dataclass
class Score:
    loss: float
    KIND
    def again(self):
        return f"{self.loss:.4f}"
def report(score):
    TELL
"""
    + MAIN.replace(
        EVAL, "    first = Score(eval_ttt(args, model, val))\n    report(Score(eval_val(args, model, val)))\n"
    )
)
TOLD = TOLD[: TOLD.index('    print(f"final val_loss')] + "main()\n"
KINDS = {
    "fields": "",
    "str": 'def __str__(self):\n        return f"val_loss:{self.loss:.4f}"',
    "format": 'def __format__(self, spec):\n        return "val_loss:%.4f" % self.loss',
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tell", ['print(f"final {score}")', 'print("final", score)'])
def test_an_object_that_is_printed_says_its_numbers(kind: str, tell: str) -> None:
    text = TOLD.replace("KIND", KINDS[kind]).replace("TELL", tell)
    assert broken(text) == {"rescoring-after-adaptation"}
    assert broken(text.replace("first = Score(eval_ttt(args, model, val))", "pass")) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_that_was_chosen_by_its_loss_says_so_when_it_is_printed(kind: str) -> None:
    best = BEST.replace("    epochs: int\n", f"    epochs: int\n    {KINDS[kind]}\n", 1)
    best = best.replace(
        "    final = several(args, model, val).loss\n", '    print(f"final {several(args, model, val)}")\n'
    )
    best = best[: best.index('    print(f"final val_loss')] + "main()\n"
    assert "min-over-passes" in broken(best.replace("CHOICE", CHOICES["attrgetter"]))
    assert "min-over-passes" not in doubted(best.replace("CHOICE", CHOICES["attrgetter"].replace('"loss"', '"epochs"')))


@pytest.mark.parametrize("reset", ["14.0", "self.reset"])
def test_a_penalty_where_documents_begin_is_no_gradient_written_out(reset: str) -> None:
    """-exp(h) - 14 (ids == bos), the decay of a recurrence, has the form of `p - (ids == token)`."""
    decay = f"e = self.emb(x)\n        h = e + (-e.exp() - {reset} * (x == 1).unsqueeze(-1).float()).exp()"
    text = HONEST.replace("h = self.emb(x)", decay).replace("self.temperature = 1.0", "self.reset = 14.0")
    assert decay in text
    assert doubted(text) == set()
