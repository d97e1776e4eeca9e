"""The walk follows what the language offers: each mechanism once honest (scored, then learned) and once the other way."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from tests.audit.order import HEAD, MAIN, broken, doubted

EVAL = "    final = eval_ttt(args, model, val)\n"
CHUNKS = "    for s in range(0, val.numel() - 1024, 1024):\n        x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]\n"
OPT = "torch.optim.SGD(model.parameters(), lr=1e-3)"

FUNCTIONAL = """
from torch.func import functional_call, grad, grad_and_value, vmap
def walk(args, model, val):
    params = {k: v.detach().clone() for k, v in model.named_parameters()}
    def loss_of(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x,)).view(-1, 1024), y.reshape(-1))
    total, count = 0.0, 0
CHUNKS        ONE
        TWO
        count += 1024
    return total / count
"""
LEARN_FUNCTIONAL = "g = grad(loss_of)(params, x, y); params = {k: p - 0.1 * g[k] for k, p in params.items()}"
LEARN_VALUED = "g, _ = grad_and_value(loss_of)(params, x, y); params = {k: p - 0.1 * g[k] for k, p in params.items()}"
LEARN_ROWS = "g = vmap(grad(loss_of), in_dims=(None, 0, 0))(params, x, y); params = {k: p - 0.1 * g[k].mean(0) for k, p in params.items()}"
SCORE_FUNCTIONAL = "total += loss_of(params, x, y).item() * 1024"
SCORE_ROWS = "total += vmap(loss_of, in_dims=(None, 0, 0))(params, x, y).sum().item() * 1024"

MATCH = """
from dataclasses import dataclass
@dataclass
class Score:
    x: torch.Tensor
    y: torch.Tensor
@dataclass
class Learn:
    x: torch.Tensor
    y: torch.Tensor
def walk(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
CHUNKS        for job in [ONE, TWO]:
            match job:
                case PRICE:
                    with torch.no_grad():
                        total += model(x, y).item() * 1024
                    count += 1024
                case TRAIN:
                    opt.zero_grad()
                    model(a, b).backward()
                    opt.step()
                case _:
                    raise ValueError(job)
    return total / count
"""

COROUTINES = """
def scorer(model):
    total, count = 0.0, 0
    while True:
        pair = yield (total, count)
        if pair is None:
            return
        x, y = pair
        with torch.no_grad():
            total += model(x, y).item() * y.numel()
        count += y.numel()
def learner(model):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    while True:
        x, y = yield
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
def walk(args, model, val):
    score, learn = scorer(model), learner(model)
    next(score)
    learn.send(None)
CHUNKS        ONE
        TWO
    return total / count
"""

REGISTRY = """
STAGES = MADE
def stage(name):
    def mark(function):
        KEEP
        return function
    return mark
ONE
TWO
def walk(args, model, val):
    state = {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=1e-3), "total": 0.0, "count": 0}
CHUNKS        for run in ALL:
            state = run(state, x, y)
    return state["total"] / state["count"]
"""
PRICE_STAGE = """
@stage("price")
def price(state, x, y):
    with torch.no_grad():
        state["total"] += state["model"](x, y).item() * y.numel()
    state["count"] += y.numel()
    return state
"""
ADAPT_STAGE = """
@stage("adapt")
def adapt(state, x, y):
    state["opt"].zero_grad()
    state["model"](x, y).backward()
    state["opt"].step()
    return state
"""

RECURSION = """
def follow(model, opt, val, s):
    if s + 1025 > val.numel():
        return 0.0, 0
    x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]
    ONE
    TWO
    rest, n = follow(model, opt, val, s + 1024)
    return rest + mine, n + 1024
def walk(args, model, val):
    total, count = follow(model, torch.optim.SGD(model.parameters(), lr=1e-3), val, 0)
    return total / count
"""
MINE = "mine = model(x, y).detach().item() * 1024"
STEP = "opt.zero_grad(); model(x, y).backward(); opt.step()"

STAGED = """
def open_(state):
    state["model"] = GPT().cuda()
    train(state["args"], state["model"])
    state["val"] = load(state["args"].val_files)
    return state
def adapt(state):
    model, val = state["model"], state["val"]
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for s in range(0, val.numel() - 1024, 1024):
        opt.zero_grad()
        model(val[s : s + 1024][None], val[s + 1 : s + 1025][None]).backward()
        opt.step()
    return {**state, "model": model}
def price(state):
    return state | {"loss": eval_val(state["args"], state["model"], state["val"])}
def say(state):
    print(f"final val_loss:{state['loss']:.6f}")
    return state
functools.reduce(lambda state, stage: stage(state), [open_, ONE, TWO], {"args": Hyperparameters()})
"""

FLAT = """
args = Hyperparameters()
model = GPT().cuda()
train(args, model)
val = load(args.val_files)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
total, count = 0.0, 0
for s in range(0, val.numel() - 1024, 1024):
    x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]
    ONE
    TWO
    count += 1024
print(f"final val_loss:{total / count:.6f}")
"""

WALK = MAIN.replace(EVAL, "    final = walk(args, model, val)\n")
ROWS = HEAD.replace(
    "    def forward(self, x, y):\n        logits = self.forward_logits(x)\n",
    "    def forward(self, x, y=None):\n        logits = self.forward_logits(x)\n        if y is None:\n            return logits\n",
)


def match(price: str, train: str) -> str:
    return MATCH.replace("PRICE", price).replace("TRAIN", train)


def registry(made: str, keep: str, every: str) -> str:
    return REGISTRY.replace("MADE", made).replace("KEEP", keep).replace("ALL", every)


MECHANISMS = {  # the script, the step that scores, the step that learns
    "torch.func.grad with functional_call": (ROWS + FUNCTIONAL + WALK, SCORE_FUNCTIONAL, LEARN_FUNCTIONAL),
    "torch.func.grad_and_value": (ROWS + FUNCTIONAL + WALK, SCORE_FUNCTIONAL, LEARN_VALUED),
    "torch.func.vmap": (ROWS + FUNCTIONAL + WALK, SCORE_ROWS, LEARN_ROWS),
    "match with class patterns": (HEAD + match("Score(x, y)", "Learn(x=a, y=b)") + WALK, "Score(x, y)", "Learn(x, y)"),
    "match with sequence patterns": (
        HEAD + match('("score", x, y)', '["learn", a, *_, b] if len(job) == 3') + WALK, '("score", x, y)', '("learn", x, y)',
    ),
    "match with mapping patterns": (
        HEAD + match('{"do": "score" | "price", "x": x}', '{"do": "learn", "x": a, "y": b, **rest}') + WALK,
        'dict(do="score", x=x, y=y)', 'dict(do="learn", x=x, y=y)',
    ),
    "coroutines that are sent the chunks": (HEAD + COROUTINES + WALK, "total, count = score.send((x, y))", "learn.send((x, y))"),
    "functions registered in a dict": (HEAD + registry("{}", "STAGES[name] = function", "STAGES.values()") + WALK, PRICE_STAGE, ADAPT_STAGE),
    "functions registered in a list": (HEAD + registry("[]", "STAGES.append(function)", "STAGES") + WALK, PRICE_STAGE, ADAPT_STAGE),
    "a scoring function that calls itself": (HEAD + RECURSION + WALK, MINE, STEP),
    "stages that hand a dict on": (HEAD + STAGED, "price, say", "adapt"),
    "a script without functions": (HEAD + FLAT, "total += model(x, y).detach().item() * 1024", STEP),
}  # fmt: skip


def script(name: str, score_first: bool) -> str:
    text, score, learn = MECHANISMS[name]
    one, two = (score, learn) if score_first else (learn, score)
    return text.replace("CHUNKS", CHUNKS).replace("ONE", one).replace("TWO", two)


@pytest.mark.parametrize("name", MECHANISMS)
def test_score_first_is_clean_in_every_form(name: str) -> None:
    assert doubted(script(name, True)) == set()


@pytest.mark.parametrize("name", MECHANISMS)
def test_learning_first_is_found_in_every_form(name: str) -> None:
    assert broken(script(name, False)) == {"training-before-scoring"}


SUMMED = (
    HEAD
    + "\ndef losses(model, val):\n    return sum(model(val[s : s + 1024][None], val[s + 1 : s + 1025][None]).item() for s in range(0, val.numel() - 1024, 1024)) / (val.numel() // 1024)\n"
)


def test_a_generator_expression_is_summed_under_the_weights_of_its_time() -> None:
    assert doubted(SUMMED + MAIN.replace(EVAL, "    final = losses(model, val)\n")) == set()
    again = MAIN.replace(EVAL, "    eval_ttt(args, model, val)\n    final = losses(model, val)\n")
    assert broken(SUMMED + again) == {"rescoring-after-adaptation"}


def test_a_choice_between_patterns_by_a_setting_follows_the_command() -> None:
    text = HEAD + MAIN.replace(
        EVAL,
        '    match os.environ.get("MODE", "once"):\n        case "again":\n            eval_ttt(args, model, val)\n'
        "            final = eval_val(args, model, val)\n        case _:\n            final = eval_ttt(args, model, val)\n",
    )
    assert doubted(text) == set()
    assert broken(text, MODE="again") == {"rescoring-after-adaptation"}


PACKED = """
def packed(args, model, val):
    for clip in (1.0, 1.1, 1.2, 1.4):
        blob = zlib.compress(io.BytesIO(pack(model, clip)).getvalue())
        if len(blob) < 16_000_000:
            break
    else:
        raise RuntimeError("it does not fit")
    open("model.bin", "wb").write(blob)
    model.load_state_dict(torch.load(io.BytesIO(zlib.decompress(open("model.bin", "rb").read()))))
    return eval_val(args, model, val)
def pack(model, clip):
    buffer = io.BytesIO()
    torch.save({k: v / clip for k, v in model.state_dict().items()}, buffer)
    return buffer.getvalue()
"""
LOOKED = """    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(val[:4096].view(-1, 1024), val[1:4097].view(-1, 1024)).backward()
    opt.step()
"""


def test_what_follows_a_loop_whose_else_raises_was_come_to_by_a_break() -> None:
    """The artifact was never written: nothing that scored had been trained."""
    main = MAIN.replace(EVAL, "    LOOK\n    final = packed(args, model, val)\n")
    assert "training-before-scoring" in broken(HEAD + PACKED + main.replace("    LOOK\n", LOOKED)) | broken(
        HEAD + PACKED + main.replace("    LOOK\n", LOOKED).replace("AdamW", "SGD")
    )
    assert doubted(HEAD + PACKED + main.replace("    LOOK\n", "")) == set()


ASKED = """
def stream(files):
    tokens, pos, which = shard(files[0]), 0, 0
    want = yield None
    while True:
        parts = []
        while want > 0:
            if pos >= tokens.numel():
                which = (which + 1) % len(files)
                tokens, pos = shard(files[which]), 0
            part = tokens[pos : pos + want]
            parts.append(part)
            pos += part.numel()
            want -= part.numel()
        want = yield (parts[0] if len(parts) == 1 else torch.cat(parts))

class Loader:
    def __init__(self, pattern):
        self.stream = stream(FILES)
        next(self.stream)
    def next(self, n):
        part = self.stream.send(n + 1)
        return part[:-1].view(-1, 1024), part[1:].view(-1, 1024)
"""


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ("sorted(glob.glob(pattern))", set()),
        ("sorted(glob.glob(pattern)) + sorted(glob.glob(Hyperparameters.val_files))", {"validation-in-training"}),
    ],
    ids=["training-files", "validation-files-too"],
)
def test_a_generator_that_waits_before_its_loop_yields_what_the_loop_does(files: str, wanted: set[str]) -> None:
    start, end = HEAD.index("class Loader:"), HEAD.index("class GPT(")
    text = HEAD[:start] + ASKED.replace("FILES", files).lstrip() + "\n" + HEAD[end:] + MAIN
    assert broken(text) == wanted
