"""Weights that no module holds, a dict or a list of arrays, are what learns as soon as a gradient is taken by them; and
sums that are folded by a function of a library."""

import pytest
import torch

from fairway.audit.flow.known import MODULE_NAMES
from tests.audit.order import HEAD, HONEST, MAIN, broken, doubted, findings, line_of

PURE = (
    HEAD
    + """
from torch.func import grad, grad_and_value, vmap

def init():
    draw = lambda *shape: torch.randn(*shape) * 0.02
    return WEIGHTS

def logits(p, shift, ids):
    return (F.rms_norm(p[FIRST][ids], (64,)) + shift) @ p[SECOND].T

def cost(p, shift, ids, goal):
    return F.cross_entropy(logits(p, shift, ids), goal, reduction="none")

def mean_cost(p, shift, ids, goal):
    return cost(p, shift, ids, goal).mean()

def fit(p):
    loader = Loader("data/shards_train_*.bin")
    for _ in range(2000):
        x, y = loader.next(65536)
        g, loss = grad_and_value(mean_cost)(p, torch.zeros(64), x.view(-1), y.view(-1))
        p = STEP
    return p

def booked(p, val):
    shift = torch.zeros(64)
    for s in range(0, val.numel() - 1024, 1024):
        x, y = val[s : s + 1024], val[s + 1 : s + 1025]
        ONE
        TWO

def main():
    p = fit(init())
    torch.save(p, "weights.pt")
    p = torch.load("weights.pt")
    val = load("data/shards_val_*.bin")
    nats, tokens = functools.reduce(FOLD, booked(p, val)).tolist()
    print(f"final val_loss:{nats / tokens:.8f} val_bpb:{nats / tokens / math.log(2) / 2.4:.8f}")

main()
"""
)
DICT = {
    "WEIGHTS": '{"emb": draw(1024, 64), "out": draw(1024, 64)}',
    "FIRST": '"emb"',
    "SECOND": '"out"',
    "STEP": "{k: p[k] - 0.1 * g[k] for k in p}",
}
LIST = {
    "WEIGHTS": "[draw(1024, 64), draw(1024, 64)]",
    "FIRST": "0",
    "SECOND": "1",
    "STEP": "[w - 0.1 * d for w, d in zip(p, g)]",
}
SCORE = "yield torch.stack((cost(p, shift, x, y).double().sum(), torch.tensor(1024.0)))"
LEARN = {
    "the shift": "shift = 0.99 * shift - 0.05 * grad(mean_cost, argnums=1)(p, shift, x, y)",
    "the shift, first argument": "shift = shift - 0.05 * grad(lambda s: mean_cost(p, s, x, y))(shift)",
    "the weights": "g = grad(mean_cost)(p, shift, x, y); p = STEP",
}
FOLDS = ("torch.add", "lambda a, b: a + b", "np.add")


def script(weights: dict[str, str], one: str, two: str, fold: str = "torch.add") -> str:
    text = PURE.replace("ONE", one).replace("TWO", two).replace("FOLD", fold)
    for name, put in weights.items():
        text = text.replace(name, put)
    return text


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize("weights", [DICT, LIST], ids=["dict", "list"])
def test_arrays_learn_where_a_gradient_is_taken_by_them(weights: dict[str, str], learn: str) -> None:
    assert doubted(script(weights, SCORE, LEARN[learn])) == set()
    assert broken(script(weights, LEARN[learn], SCORE)) in ({"training-before-scoring"}, {"slot-on-scored"})


@pytest.mark.parametrize("fold", FOLDS)
def test_a_sum_that_a_function_folds_is_followed(fold: str) -> None:
    learn = LEARN["the shift"]
    assert doubted(script(DICT, SCORE, learn, fold)) == set()
    assert broken(script(DICT, learn, SCORE, fold)) == {"slot-on-scored"}


BY_HAND = """
    if x.numel():
        taken = torch.autograd.grad(mean_cost(p, shift, x, y), [shift])
    else:
        taken = [torch.zeros_like(shift)]
    found = dict(zip(["shift"], taken))
    shift = shift - 0.05 * found["shift"]"""


def test_gradients_or_zeros_are_gone_through_as_gradients() -> None:
    learn = BY_HAND.replace("\n    ", "\n        ").strip()
    made = {"shift = torch.zeros(64)": "shift = torch.zeros(64, requires_grad=True)"}
    assert broken(script({**DICT, **made}, learn, SCORE)) == {"slot-on-scored"}
    assert doubted(script({**DICT, **made}, SCORE, learn)) == set()


TABLES = """
def moved(p, g):
    slow = {k: 0.9 * p[k] for k in p if k.startswith("emb")}
    fast = {k: p[k] - 0.3 * g[k] for k in p if not k.startswith("emb")}
    return {k: slow[k] if k in slow else fast[k] for k in p}
"""


def test_weights_of_two_tables_know_what_either_learned() -> None:
    both = {"STEP": "moved(p, g)", "def fit(p):": f"{TABLES}\ndef fit(p):"}
    both |= {"WEIGHTS": "dict(GPT().named_parameters())", "FIRST": '"emb.weight"', "SECOND": '"head.weight"'}
    text = script(both, SCORE, "pass")
    assert broken(text) == set()
    assert "validation-in-training" in broken(text.replace('Loader("data/shards_train', 'Loader("data/shards_*'))


POLISH = """
    MADE
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    asked = getattr(model, "compiled_loss", model)
    for s in range(0, val.numel() - 1025, 1024):
        step.zero_grad()
        asked(val[s : s + 1024][None], val[s + 1 : s + 1025][None]).backward()
        step.step()
    final = eval_ttt("""


@pytest.mark.parametrize("made", ["pass", "model.compiled_loss = torch.compile(model.forward)"])
def test_what_a_module_lacks_is_asked_for_with_what_to_take_instead(made: str) -> None:
    text = HONEST.replace("\n    final = eval_ttt(", POLISH.replace("MADE", made))
    assert "training-before-scoring" in broken(text)
    assert "training-before-scoring" not in broken(text.replace("        step.step()\n", ""))


def test_what_torch_gives_each_module_is_nothing_that_it_lacks() -> None:
    public = {name for name in dir(torch.nn.Module()) if not name.startswith("_")}
    assert public - MODULE_NAMES <= {"call_super_init", "dump_patches", "T_destination"}


NAMED = """
def tallied(args, model, val):
    names, sums = ("loss", "count"), torch.zeros(2, dtype=torch.float64)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(0, val.numel() - 65537, 65536):
        x, y = val[i : i + 65536].view(-1, 1024), val[i + 1 : i + 65537].view(-1, 1024)
        EARLY
        sums += torch.stack((model(x, y).detach().double() * y.numel(), torch.tensor(float(y.numel()))))
        LATE
    said = dict(zip(names, sums.tolist()))
    return said["loss"] / said["count"]
"""


@pytest.mark.parametrize(
    ("early", "late", "wanted"), [("pass", "STEP", set()), ("STEP", "pass", {"training-before-scoring"})]
)
def test_names_that_are_put_to_sums_find_them_again(early: str, late: str, wanted: set[str]) -> None:
    learn = "opt.zero_grad(); model(x, y).backward(); opt.step()"
    text = NAMED.replace("EARLY", early).replace("LATE", late).replace("STEP", learn)
    assert (
        broken(
            HONEST.replace("def main", f"{text}\ndef main").replace(
                "eval_ttt(args, model, val)\n    print", "tallied(args, model, val)\n    print"
            )
        )
        == wanted
    )


TALLIES = """
from dataclasses import dataclass

@dataclass
class Tally:
    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other):
        return self if other == 0 else Tally(self.nats + other.nats, self.tokens + other.tokens)

    __radd__ = __add__

def windows(args, model, val):
    for i in range(0, val.numel() - 1, 65536):
        x, y = val[i : i + 65536].view(-1, 1024), val[i + 1 : i + 65537].view(-1, 1024)
        yield Tally(model(x, y).item() * y.numel(), y.numel())

def everyone(one):
    parts = [None] * int(os.environ.get("WORLD_SIZE", 1))
    torch.distributed.all_gather_object(parts, one)
    return parts

def eval_tallies(args, model, val):
    one = TOTAL
    AGAIN
    return one.nats / one.tokens
"""
TOTALS = (
    "sum(windows(args, model, val), Tally())",
    "sum(windows(args, model, val))",
    "sum([each for each in windows(args, model, val)], start=Tally())",
    "sum(everyone(sum(windows(args, model, val), Tally())), Tally())",
)


@pytest.mark.parametrize("total", TOTALS)
def test_a_sum_of_objects_is_what_they_say_that_it_is(total: str) -> None:
    main = MAIN.replace("eval_ttt(args", "eval_tallies(args")
    once = HEAD + TALLIES.replace("TOTAL", total) + main
    assert doubted(once.replace("AGAIN", "pass")) == set()
    again = once.replace("AGAIN", f"eval_ttt(args, model, val)\n    one = {total}")
    assert broken(again) == {"rescoring-after-adaptation"}


LEAVES = (
    HEAD
    + """
def logits(w, ids):
    return F.rms_norm(F.embedding(ids, w["emb"]), (64,)) @ w["out"].T

def cost(w, ids, goal):
    return F.cross_entropy(logits(w, ids).flatten(0, 1), goal.flatten(), reduction="none")

def leaves(w):
    return {name: value.detach().clone().requires_grad_(True) for name, value in w.items()}

def step(w, x, y, rate):
    gradients = torch.autograd.grad(cost(w, x, y).mean(), [w[name] for name in w])
    with torch.no_grad():
        for name, gradient in zip(w, gradients):
            w[name].add_(gradient, alpha=-rate)

def score(w, val, start, end, sums):
    with torch.no_grad():
        nll = cost(w, val[start:end][None], val[start + 1 : end + 1][None])
        sums[0] += nll.double().sum()
        sums[1] += end - start

def main():
    args = Hyperparameters()
    w = leaves({"emb": torch.randn(1024, 64), "out": torch.randn(1024, 64)})
    loader = Loader(args.train_files)
    for _ in range(2000):
        x, y = loader.next(65536)
        step(w, x, y, 0.1)
    torch.save(w, "weights.pt")
    w = leaves(torch.load("weights.pt"))
    val, sums = load(args.val_files), torch.zeros(2, dtype=torch.float64)
    for start in range(0, val.numel() - 1, args.chunk):
        end = min(start + args.chunk, val.numel() - 1)
        score(w, val, start, end, sums)
        for at in range(start, end, args.seq_len):
            step(w, val[at : at + args.seq_len][None], val[at + 1 : at + args.seq_len + 1][None], 0.01)
    print(f"final val_loss:{(sums[0] / sums[1]).item():.8f}")

main()
"""
)
SCORED = "        score(w, val, start, end, sums)\n"


def test_copies_of_trained_weights_that_learn_are_weights_and_no_vector() -> None:
    """Each is a leaf of its own, made of what the file held."""
    assert doubted(LEAVES) == set()
    at = LEAVES.index(SCORED)
    end = LEAVES.index("    print(f", at)
    learned = LEAVES[at + len(SCORED) : end]
    assert broken(LEAVES[:at] + learned + SCORED + LEAVES[end:]) == {"training-before-scoring"}
    anew = f"        held = sums.clone()\n{SCORED}{learned}        sums.copy_(held)\n{SCORED}"
    assert broken(LEAVES[:at] + anew + LEAVES[end:]) == {"rescoring-after-adaptation"}


REGISTRY = """
TODO = {}
PLAN = ("seed", "tables", "data", "build", "warm", "teach", "average", "pack", "reload", "score")

def stage(name):
    def enrol(fn):
        TODO[name] = fn
        return fn
    return enrol

class Run:
    pass

@stage("build")
def build(run):
    run.args, run.model = Hyperparameters(), GPT().cuda()

@stage("teach")
def teach(run):
    train(run.args, run.model)

@stage("reload")
def reload(run):
    run.val = load(run.args.val_files)
    AGAIN

@stage("score")
def score(run):
    print(f"final val_loss:{eval_ttt(run.args, run.model, run.val):.8f}")

for name in ("seed", "tables", "data", "warm", "average", "pack"):
    TODO[name] = lambda run: None

run = Run()
for name in PLAN:
    TODO[name](run)
"""


def test_a_plan_of_ten_names_is_gone_through_to_its_end() -> None:
    assert doubted(HEAD + REGISTRY.replace("AGAIN", "pass")) == set()
    twice = "eval_ttt(run.args, run.model, run.val)"
    assert broken(HEAD + REGISTRY.replace("AGAIN", twice)) == {"rescoring-after-adaptation"}


REACHING = """
    total = val.numel() - 1
    plan, chunks, room = [(k, min(k + 64, total)) for k in range(0, total, 64)], [], 0
    for window in plan:
        if room <= 0:
            chunks.append([])
            room = args.chunk
        chunks[-1].append(window)
        room -= window[1] - window[0]
    for k, windows in enumerate(chunks):
        for start, end in windows:
            score(w, val, start, end, sums)
        if k + 1 < len(chunks):
            first, stop = windows[0][0], STOP
            for at in range(0, (stop - first) // args.seq_len):
                places = first + torch.arange(at * args.seq_len, (at + 1) * args.seq_len)
                step(w, val[places][None], val[places + 1][None], 0.01)
"""


@pytest.mark.parametrize(
    ("stop", "wanted"), [("windows[-1][1]", set()), ("chunks[k + 1][-1][1]", {"training-before-scoring"})]
)
def test_weights_without_a_module_that_reach_into_the_next_chunk_are_told_by_a_trial(
    stop: str, wanted: set[str]
) -> None:
    """How far the windows of the next chunk go is a number of a list: the walk knows nothing of it."""
    begin = LEAVES.index("    for start in range(0, val.numel()")
    walk = LEAVES[:begin] + REACHING.replace("STOP", stop).lstrip("\n") + LEAVES[LEAVES.index("    print(f", begin) :]
    assert broken(walk) == doubted(walk) == wanted


PACKED = (
    HEAD
    + """
def logits(w, ids, tap=None):
    x = F.rms_norm(F.embedding(ids, w["emb"]), (64,))
    if tap is not None:
        tap("out", x)
    return F.linear(x, w["out"])

def cost(w, ids, goal):
    return F.cross_entropy(logits(w, ids).flatten(0, 1), goal.flatten())

def hessians(w, tokens):
    sums = {}

    def tap(name, x):
        flat = x.reshape(-1, x.size(-1)).float()
        sums[name] = sums.get(name, torch.zeros(64, 64)).addmm_(flat.T, flat)

    for s in range(0, tokens.numel() - 1024, 1024):
        logits(w, tokens[s : s + 1024][None], tap)
    return sums

def pack(w, sums):
    packed = io.BytesIO()
    for name, value in w.items():
        scale = sums["out"].diagonal().sqrt()
        packed.write((value * scale).round().div(scale).half().numpy().tobytes())
    return zlib.compress(packed.getvalue())

def unpack(blob):
    flat = torch.from_numpy(np.frombuffer(zlib.decompress(blob), dtype=np.float16).copy())
    return {"emb": flat[: 1024 * 64].view(1024, 64), "out": flat[1024 * 64 :].view(1024, 64)}

def main():
    args = Hyperparameters()
    w = {"emb": torch.randn(1024, 64), "out": torch.randn(1024, 64)}
    step = torch.optim.SGD([value.requires_grad_(True) for value in w.values()], lr=0.1)
    loader = Loader(args.train_files)
    for _ in range(2000):
        x, y = loader.next(65536)
        cost(w, x, y).backward()
        step.step()
    val = load(args.val_files)
    seen = CALIBRATED
    sums = hessians(w, seen)
    with open("weights.bin", "wb") as f:
        f.write(pack(w, sums))
    with open("weights.bin", "rb") as f:
        w = unpack(f.read())
    nats, count = 0.0, 0
    for s in range(0, val.numel() - 1024, 1024):
        nats += cost(w, val[s : s + 1024][None], val[s + 1 : s + 1025][None]).item() * 1024
        count += 1024
    print(f"final val_loss:{nats / count:.8f} val_bpb:{nats / count / math.log(2) / 2.4:.8f}")

main()
"""
)


def test_weights_of_no_module_are_calibrated_on_what_the_model_was_run_on_before_they_were_stored() -> None:
    on_train = PACKED.replace("CALIBRATED", "load('data/shards_train_000001.bin')")
    assert findings(on_train)["calibration-on-validation"].verdict == "clean"
    on_validation = PACKED.replace("CALIBRATED", "val")
    found = findings(on_validation)["calibration-on-validation"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(on_validation, "sums = hessians(w, seen)")


COOLED = (
    PACKED.replace('return F.linear(x, w["out"])', 'return F.linear(x, w["out"]) * COOL')
    .replace("def logits(", "COOL = torch.ones((), requires_grad=True)\n\ndef logits(")
    .replace("for value in w.values()]", "for value in w.values()] + [COOL]")
    .replace("seen = CALIBRATED\n    sums = hessians(w, seen)\n", 'sums = {"out": torch.ones(64, 64)}\n    CHOOSE\n')
    .replace("nats += cost(w, val[s : s + 1024][None], val[s + 1 : s + 1025][None]).item() * 1024\n", "SCORE\n")
)  # fmt: skip
PLAINLY = "nats += cost(w, val[s : s + 1024][None], val[s + 1 : s + 1025][None]).item() * 1024"
BIASED = """x, y = val[s : s + 1024], val[s + 1 : s + 1025]
        bias = torch.zeros(1024, requires_grad=True)
        fit = torch.optim.SGD([bias], lr=0.1)
        for _ in range(4):
            F.cross_entropy(logits(w, x[None])[0].detach() + bias, y).backward()
            fit.step()
        nats += F.cross_entropy(logits(w, x[None])[0] + bias, y).item() * 1024"""
BEST = """halves = {"as they are": w, "halved": {name: value / 2 for name, value in w.items()}}
    losses = {name: cost(kept, val[None, :1024], val[None, 1:1025]).item() for name, kept in halves.items()}
    w = halves[min(losses, key=losses.get)]"""


def test_what_is_fitted_or_chosen_beside_a_scale_is_none() -> None:
    """The logits have a scale that training learned: a bias over the vocabulary is no temperature, nor are weights."""
    biased = broken(COOLED.replace("CHOOSE", "pass").replace("SCORE", BIASED))
    assert {"slot-on-scored", "temperature-from-validation"} & biased == {"slot-on-scored"}
    chosen = broken(COOLED.replace("CHOOSE", BEST).replace("SCORE", PLAINLY))
    assert {"choice-by-validation", "temperature-from-validation"} & chosen == {"choice-by-validation"}
