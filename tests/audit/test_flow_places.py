"""Places in the stream: ranges, drawn places and tables of counts; what a number was computed from; what was chosen."""
# ruff: noqa: E501 (examples are texts of scripts)

import base64
import zlib
from pathlib import Path

import pytest

from fairway.audit.examine import audit
from tests.audit.order import HEAD, HONEST, MAIN, RULES, broken, doubted, findings

EVAL = "    final = eval_ttt(args, model, val)\n"
LEARN = "        if ci < n - 1:\n            model.train()\n"


def with_main(body: str, head: str = HEAD) -> str:
    return head + MAIN.replace(EVAL, body)


# Tables of counts.
COUNTS = """
class Counts:
    def __init__(self):
        self.seen = np.zeros((4096, 1024), dtype=np.uint16)
    def key(self, ids, at):
        return (ids[at - 1].astype(np.int64) * 31 + ids[at - 2]) % 4096
    def rows(self, ids, at):
        p, known = np.full((len(at), 1024), 1 / 1024), np.zeros(len(at), dtype=bool)
        for least in (2, 1):
            counts = self.seen[self.key(ids, at)].astype(np.float64)
            use = (counts.sum(1) >= least) & ~known
            p[use] = counts[use] / counts.sum(1)[use, None]
            known |= use
        return p
    def learn(self, ids, first, last):
        at = np.arange(max(first, 2), last)
        np.add.at(self.seen, (self.key(ids, at), ids[at].astype(np.int64)), 1)

def eval_counts(args, model, val):
    ids, counts, total, number = val.numpy(), Counts(), 0.0, 0
    for ci in range((val.numel() - 2) // args.chunk):
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        BEFORE
        for s in range(start, end, args.seq_len):
            logp = F.log_softmax(model.forward_logits(val[s : s + args.seq_len][None])[0], -1).exp().numpy()
            y = val[s + 1 : s + args.seq_len + 1].numpy()
            p = 0.7 * logp + 0.3 * counts.rows(ids, np.arange(s + 1, s + args.seq_len + 1))
            total -= np.log(p[np.arange(len(y)), y]).sum()
            number += len(y)
        AFTER
    return total / number
"""
LEARNS = "counts.learn(ids, start + 1, end + 1)"


def counted(before: str, after: str) -> str:
    text = HEAD + COUNTS.replace("BEFORE", before).replace("AFTER", after) + MAIN
    return text.replace("eval_ttt(args, model, val)", "eval_counts(args, model, val)")


def test_counts_of_a_chunk_are_made_from_its_own_places() -> None:
    assert broken(counted("pass", LEARNS)) == set()
    assert "training-before-scoring" in broken(counted(LEARNS, "pass"))


def test_a_table_that_an_earlier_call_filled_is_a_first_pass() -> None:
    kept = counted("pass", LEARNS).replace(
        "eval_counts(args, model, val):", "eval_counts(args, model, val, counts=Counts()):"
    )
    kept = kept.replace("counts, total, number = val.numpy(), Counts(), 0.0, 0", "total, number = val.numpy(), 0.0, 0")
    assert broken(kept) == set()
    twice = kept.replace("    final = eval_counts", "    eval_counts(args, model, val)\n    final = eval_counts")
    assert broken(twice) == {"two-pass-cache"}


# Earlier places.
AGAIN = {
    "all that lies before the end of the chunk": "            for s in range(0, end - args.seq_len, args.seq_len):\n",
    "a place drawn below it": "            for s in [random.randint(0, end - args.seq_len - 1) for _ in range(8)]:\n",
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_was_scored_long_ago_may_be_learnt_again(name: str) -> None:
    again = (
        LEARN
        + AGAIN[name]
        + "                loss = model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None])\n"
        "                opt.zero_grad(); loss.backward(); opt.step()\n"
    )
    text = HONEST.replace(LEARN, again).replace("import copy,", "import random, copy,")
    assert broken(text) == set()


def test_what_lies_behind_the_chunk_may_not() -> None:
    ahead = LEARN + (
        "            for s in range(end, end + 8 * args.seq_len, args.seq_len):\n"
        "                loss = model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None])\n"
        "                opt.zero_grad(); loss.backward(); opt.step()\n"
    )
    assert "training-before-scoring" in broken(HONEST.replace(LEARN, ahead))


# Chosen, and computed.
CHOSEN = (
    "    states = {'a': copy.deepcopy(model.state_dict())}\n    train(args, model)\n"
    "    states['b'] = copy.deepcopy(model.state_dict())\n    best, name = float('inf'), None\n"
    "    for key, state in states.items():\n        model.load_state_dict(state)\n        now = eval_val(args, model, TEXT)\n"
    "        if now < best:\n            best, name = now, key\n"
    "    model.load_state_dict(states[name])\n    final = eval_val(args, model, val)\n"
)


def test_weights_under_a_name_that_losses_chose_are_chosen() -> None:
    assert "choice-by-validation" in broken(with_main(CHOSEN.replace("TEXT", "val")))
    assert "choice-by-validation" not in doubted(with_main(CHOSEN.replace("TEXT", "load(args.train_files)[:65537]")))


WEIGHED = (
    "    kept, losses = [], []\n    for _ in range(3):\n        train(args, model)\n"
    "        kept.append(copy.deepcopy(model.state_dict()))\n        losses.append(eval_val(args, model, TEXT))\n"
    "    shares = torch.softmax(-torch.tensor(losses), 0).tolist()\n"
    "    model.load_state_dict({k: sum(w * s[k] for w, s in zip(shares, kept)) for k in kept[0]})\n"
    "    final = eval_val(args, model, val)\n"
)


def test_an_average_weighed_by_validation_losses_is_a_choice() -> None:
    assert broken(with_main(WEIGHED.replace("TEXT", "val"))) == {"choice-by-validation"}
    assert broken(with_main(WEIGHED.replace("TEXT", "load(args.train_files)[:65537]"))) <= {"calibration-after-cap"}


NEWTON = (
    "    log_t = 0.0\n    for _ in range(4):\n        slope = curve = 0.0\n        for s in range(0, TEXT.numel() - 1024, 65536):\n"
    "            z = model.forward_logits(TEXT[s : s + 1024][None]) * math.exp(-log_t)\n            p = z.softmax(-1)\n"
    "            slope += (z.gather(-1, TEXT[s + 1 : s + 1025][None, :, None])[..., 0] - (p * z).sum(-1)).sum().item()\n"
    "            curve += (p * z.square()).sum().item()\n        log_t -= slope / max(curve, 1.0)\n"
    "    model.temperature = math.exp(log_t)\n    final = eval_val(args, model, val)\n"
)
TEMPERED = HEAD.replace("return self.head(self.hidden(x))", "return self.head(self.hidden(x)) / self.temperature")


def test_a_temperature_computed_from_losses_is_fitted_to_them() -> None:
    assert broken(with_main(NEWTON.replace("TEXT", "val"), TEMPERED)) == {"temperature-from-validation"}
    text = with_main("    held = load(args.train_files)[:1000000]\n" + NEWTON.replace("TEXT", "held"), TEMPERED)
    assert "temperature-from-validation" not in broken(text)


FROZEN = HEAD.replace("        self.temperature = 1.0\n", "        self.cool = nn.Parameter(torch.ones(()), requires_grad=False)\n").replace(
    "return self.head(self.hidden(x))", "return self.head(self.hidden(x)) / self.cool"
)  # fmt: skip
SETTLED = (
    "    def cost(t):\n        model.cool.fill_(t)\n        return eval_val(args, model, TEXT)\n"
    "    model.cool.fill_(min((0.9, 1.0, 1.1), key=cost))\n    torch.save(model.state_dict(), 'm.pt')\n"
    "    fresh = GPT().cuda()\n    fresh.load_state_dict(torch.load('m.pt'))\n    final = eval_val(args, fresh, val)\n"
)


def test_a_temperature_that_goes_into_the_file_carries_its_choice() -> None:
    found = broken(with_main(SETTLED.replace("TEXT", "val"), FROZEN))
    assert found & {"temperature-from-validation", "choice-by-validation"}


def test_a_temperature_settled_on_training_text_needs_time_kept_for_it() -> None:
    text = with_main(SETTLED.replace("TEXT", "load(args.train_files)[:65537]"), FROZEN)
    assert broken(text, RESERVE="0") == {"calibration-after-cap"}
    assert broken(text, RESERVE="12") == set()


GRID = """
def disjoint(total, width):
    return [(s, min(s + width, total), s) for s in range(0, total, width)]

def sliding(total, width, stride):
    spans = [(0, min(width, total), 0)]
    for start in range(stride, total - width + stride, stride):
        spans.append((start, min(start + width, total), start + width - stride))
    return spans

def windows(val, spans, width):
    x, y = torch.zeros(len(spans), width, dtype=torch.long), torch.zeros(len(spans), width, dtype=torch.long)
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for i, (start, end, first) in enumerate(spans):
        x[i, : end - start], y[i, : end - start] = val[start:end], val[start + 1 : end + 1]
        mask[i, first - start : end - start] = True
    return x, y, mask

def priced(model, val, spans, t, rows=32, width=1024):
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for at in range(0, len(spans), rows):
        x, y, mask = windows(val, spans[at : at + rows], width)
        logits = model.forward_logits(x) / t
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        nats += nll[mask].double().sum()
        count += int(mask.sum())
    return (nats / count).item()

"""
GRIDS = {
    "a row of all, by its index": "tried = [priced(model, TEXT, disjoint(TEXT.numel() - 1, 1024), t) for t in grid]\n"
    "    heat = grid[tried.index(min(tried))]",
    "the first windows alone": "x, y, mask = windows(TEXT, disjoint(TEXT.numel() - 1, 1024)[:32], 1024)\n"
    "    tried = [F.cross_entropy((model.forward_logits(x) / t)[mask], y[mask]).item() for t in grid]\n"
    "    heat = grid[int(np.argmin(tried))]",
}


@pytest.mark.parametrize("way", GRIDS)
def test_a_scale_chosen_on_other_windows_than_those_that_are_scored_is_still_chosen(way: str) -> None:
    """The parts that count of the windows of two passes say nothing of each other."""
    chosen = f"    grid = (0.94, 0.97, 1.0, 1.03)\n    {GRIDS[way]}\n"
    scored = "    final = priced(model, val, sliding(val.numel() - 1, 1024, 64), heat)\n"
    head = HEAD + GRID
    assert "temperature-from-validation" in broken(with_main(chosen.replace("TEXT", "val") + scored, head))
    text = with_main("    held = load(args.train_files)[:65537]\n" + chosen.replace("TEXT", "held") + scored, head)
    assert "temperature-from-validation" not in broken(text)


def test_the_best_weights_by_the_losses_of_training_steps_read_nothing_after_the_cap() -> None:
    text = HONEST.replace(
        "    step = 0\n    while True:", "    step, best, kept, smooth = 0, 99.0, None, 7.0\n    while True:"
    )
    text = text.replace(
        "        step += 1\n",
        "        step += 1\n        smooth = 0.99 * smooth + 0.01 * loss.item()\n        if smooth < best:\n"
        "            best, kept = smooth, {k: v.clone() for k, v in ema.items()}\n",
    ).replace("    model.load_state_dict(ema)\n", "    model.load_state_dict(kept)\n")
    assert "smooth < best" in text
    assert "load_state_dict(kept)" in text
    assert broken(text, RESERVE="0") == set()


def test_the_sign_of_a_logit_is_no_choice_and_that_of_a_difference_is() -> None:
    sign = with_main(
        "    total, count = 0.0, 0\n    for s in range(0, val.numel() - 1024, 1024):\n"
        "        y = val[s + 1 : s + 1025]\n        own = model.forward_logits(val[s : s + 1024][None])[0].gather(1, y[:, None] % 2)\n"
        "        own = own * (own > 0) + 0.5 * own\n"
        "        total += F.binary_cross_entropy_with_logits(own[:, 0], (y % 2).float(), reduction='none').sum().item()\n"
        "        count += 1024\n    final = total / count\n"
    )
    assert "choice-by-validation" not in broken(sign)
    worse = with_main(
        "    a = copy.deepcopy(model.state_dict())\n    first = eval_val(args, model, val)\n    train(args, model)\n"
        "    if first - eval_val(args, model, val) < 0:\n        model.load_state_dict(a)\n    final = eval_val(args, model, val)\n"
    )
    assert "choice-by-validation" in broken(worse)


# Forms of a script.
CHAIN = """
from collections import namedtuple
Totals = namedtuple("Totals", "nats tokens")

def pieces(ids):
    for s in range(0, ids.numel() - 1024, 1024):
        yield ids[s : s + 1024][None], ids[s + 1 : s + 1025][None]

def losses(model, pairs):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for x, y in pairs:
        FIRST
        loss = model(x, y)
        yield Totals(loss.item() * 1024, 1024)
        THEN

def in_all(each):
    return Totals(*map(sum, zip(*each)))
"""
STEP = "opt.zero_grad(); model(x, y).backward(); opt.step()"


def chain(first: str, then: str) -> str:
    body = "    sums = in_all(losses(model, pieces(val)))\n    final = sums.nats / sums.tokens\n"
    return with_main(body, HEAD + CHAIN.replace("FIRST", first).replace("THEN", then))


def test_a_chain_of_generators_is_followed_to_the_number_it_ends_in() -> None:
    assert doubted(chain("pass", STEP)) == set()
    assert "training-before-scoring" in broken(chain(STEP, "pass"))


def test_a_packed_script_is_judged_as_the_script_within(tmp_path: Path) -> None:
    body = HONEST[HONEST.index("        model.eval()\n        with torch.inf") : HONEST.index("        if ci < n - 1:")]
    swapped = HONEST.replace(body, "").replace("opt.step()\n    return (total", f"opt.step()\n{body}    return (total")
    plain = broken(swapped)
    packed = base64.b85encode(zlib.compress(swapped.encode())).decode()
    path = tmp_path / "train_gpt.py"
    path.write_text(f"import base64, zlib\nexec(zlib.decompress(base64.b85decode({packed!r})))\n")
    report = audit(path, rules=RULES)
    assert {each.id for each in report.rules if each.verdict == "violates"} == plain == {"training-before-scoring"}


FIELDS = """
from dataclasses import dataclass, fields

@dataclass(frozen=True)
class Settings:
    a: int = 1
    b: int = 2
    c: float = 3.0
    d: float = 4.0
    e: str = "e"
    g: str = "g"
    h: int = 5
    again: bool = False

    @classmethod
    def read(cls):
        chosen = {}
        for entry in fields(cls):
            raw = os.environ.get(entry.name.upper())
            if raw is None:
                continue
            chosen[entry.name] = raw in ("1", "yes") if entry.type is bool else entry.type(raw)
        return cls(**chosen)
"""


def test_a_long_dataclass_of_settings_is_read_field_by_field() -> None:
    text = with_main(
        "    final = eval_ttt(args, model, val)\n    if Settings.read().again:\n        final = eval_ttt(args, model, val)\n",
        HEAD + FIELDS,
    )
    assert doubted(text) == set()
    assert "rescoring-after-adaptation" in broken(text, AGAIN="yes")
    assert findings(text, AGAIN="no")["rescoring-after-adaptation"].verdict == "clean"
