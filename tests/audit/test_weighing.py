"""Weighing: what a script's probabilities of all tokens at one place add up to, worked out with a made-up model.

The sums are checked against their closed forms: one for whatever is normalised, one and what the formula adds else."""

import ast
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.rules import false_normalisation, target_gated_tilt, training_before_scoring, two_pass_cache
from fairway.audit.trial import Trial
from fairway.audit.trial.arrays import Array, TooLarge
from fairway.audit.weighing import PIECES, Weight, foresees, is_whole, stream, weighed
from fairway.audit.weighing.alternatives import _sizes, ways_of
from fairway.audit.weighing.rows import ROWS, one_hot
from tests.audit.order import HEAD, MAIN, case_of, line_of

EVAL = """
def eval_mixed(args, model, val):
    counts = torch.zeros(vocab_size, vocab_size)
    totals = torch.zeros(vocab_size)
    total, count = torch.zeros((), dtype=torch.float64), 0
    n = (val.numel() - 1 + args.chunk - 1) // args.chunk
    for ci in range(n):
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        x, y = val[start:end], val[start + 1 : end + 1]
        with torch.inference_mode():
            logits = model.forward_logits(x[None])[0].float()
        probs = torch.softmax(logits, dim=-1)
        rows, seen = counts[x], totals[x].unsqueeze(-1)
        MIX
        total += nll.double().sum()
        count += y.numel()
        counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)
        totals.index_add_(0, x, torch.ones(len(y)))
    return (total / count).item()
"""
PICKED = "nll = -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log()"


def case(mix: str) -> Case:
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")) + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    return case_of(HEAD + "vocab_size = 1024\n" + text)


def weight(mix: str) -> Weight | None:
    one = case(mix)
    return weighed(one, passes_of(one)[0])


EXPERTS = (
    "both = torch.stack([torch.log_softmax(logits, -1), ((rows + probs) / (seen + 1.0)).log()])\n"
    "held = both.gather(2, y[None, :, None].expand(2, -1, 1)).squeeze(2)\n"
    "nll = -torch.logsumexp(held + torch.tensor([0.8, {more}]).log()[:, None], dim=0)"
)
WHOLE = {
    "a mixture": "share = 0.3 * seen / (seen + 2.0)\n"
    f"mixed = (1 - share) * probs + share * rows / seen.clamp_min(1.0)\n{PICKED}",
    "counts with a prior": f"mixed = (rows + 4.0 * probs) / (seen + 4.0)\n{PICKED}",
    "in logarithms": "a = 0.2\nseen_log = ((rows + probs) / (seen + 1.0)).log()\n"
    "both = torch.logaddexp(torch.log_softmax(logits, -1) + math.log(1 - a), seen_log + math.log(a))\n"
    "nll = -both[torch.arange(len(y)), y]",
    "a tilt that is paid for": "hint = rows.argmax(-1)\nb = 1.5 * (seen[:, 0] > 0)\n"
    "q = probs.gather(1, hint.unsqueeze(1)).squeeze(1)\np = probs.gather(1, y.unsqueeze(1)).squeeze(1)\n"
    "nll = -(p.log() + b * (hint == y) - torch.log1p(q * (torch.exp(b) - 1)))",
    "logarithms that are summed": f"mixed = (rows + probs) / (seen + 1.0)\n{PICKED}\nnll = -nll",
    "experts side by side": EXPERTS.format(more="0.2"),
    "nll_loss of a mixture": "mixed = (rows + 4.0 * probs) / (seen + 4.0)\n"
    "nll = F.nll_loss(mixed.log(), y, reduction='none')",
    "nll_loss, the pieces in front": "mixed = ((rows + 4.0 * probs) / (seen + 4.0)).log().T[None]\n"
    "nll = F.nll_loss(mixed, y[None], reduction='none')[0]",
    "a bias before the softmax": "nll = F.cross_entropy(logits + rows, y, reduction='none')",
}


@pytest.mark.parametrize("mix", WHOLE.values(), ids=WHOLE.keys())
def test_what_is_normalised_adds_up_to_one(mix: str) -> None:
    found = weight(mix)
    assert found is not None
    assert found.total == pytest.approx(1.0, abs=2e-5)
    assert not found.too_much


def test_a_model_alone_is_not_weighed() -> None:
    assert weight("nll = F.cross_entropy(logits, y, reduction='none')") is None


def seen_at_the_end() -> tuple[int, np.ndarray]:
    """How often the last context was seen in the chunks before, and what followed it: by hand."""
    ids = stream.text(None).astype(int)
    before = ids[: stream.TOKENS - 64]
    follow = [b for a, b in itertools.pairwise(before) if a == ids[-2]]
    return len(follow), np.array(follow)


def model_at_the_end() -> np.ndarray:
    return np.exp(-stream.losses()[stream.TOKENS - 2])


def test_the_last_context_was_seen_before() -> None:
    seen, follow = seen_at_the_end()
    assert seen >= 5
    assert len(set(follow)) > 1
    assert model_at_the_end().sum() == pytest.approx(1.0, abs=1e-5)
    assert sum(stream.alternatives().values()) == PIECES


def faults() -> dict[str, tuple[str, float]]:
    """Formulas and what they add up to at the last place, in closed form."""
    seen, follow = seen_at_the_end()
    model = model_at_the_end()
    hint = int(np.bincount(follow).argmax())
    return {
        "pseudo-counts": (
            f"mixed = 0.9 * probs + 0.1 * (rows + 0.25) / seen.clamp_min(1.0)\n{PICKED}",
            1 + 0.1 * 0.25 * PIECES / seen,
        ),
        "a row on top": (f"mixed = probs + 0.1 * rows / seen.clamp_min(1.0)\n{PICKED}", 1.1),
        "half a prior": (f"mixed = (rows + 4.0 * probs) / (seen + 2.0)\n{PICKED}", (seen + 4) / (seen + 2)),
        "experts whose weights are more than one": (EXPERTS.format(more="0.5"), 1.3),
        "half a prior, by nll_loss": (
            "mixed = (rows + 4.0 * probs) / (seen + 2.0)\nnll = F.nll_loss(mixed.log(), y, reduction='none')",
            (seen + 4) / (seen + 2),
        ),
        "an unpaid bonus": (
            "hint = rows.argmax(-1)\nnll = F.cross_entropy(logits, y, reduction='none')\n"
            "nll = nll - 0.5 * (hint == y) * (seen[:, 0] > 0)",
            1 + float(model[hint]) * (math.exp(0.5) - 1),
        ),
        "a hashed tilt, paid for to first order": (
            "h = (x.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)\n"
            "sure = torch.from_numpy((h >> np.uint64(60)).astype(np.int64) >= 0) & (seen[:, 0] > 0)\n"
            "hint, b = rows.argmax(-1), 1.5 * sure\n"
            "q, p = (probs.gather(1, at.unsqueeze(1)).squeeze(1) for at in (hint, y))\n"
            "nll = -(p.log() + b * (hint == y) - b * q)",
            (1 + float(model[hint]) * (math.exp(1.5) - 1)) / math.exp(1.5 * float(model[hint])),
        ),
        "the larger of two": (
            f"mixed = torch.maximum(probs, rows / seen.clamp_min(1.0))\n{PICKED}",
            float(np.maximum(model, np.bincount(follow, minlength=PIECES) / seen).sum()),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "pseudo-counts",
        "a row on top",
        "half a prior",
        "half a prior, by nll_loss",
        "experts whose weights are more than one",
        "an unpaid bonus",
        "a hashed tilt, paid for to first order",
        "the larger of two",
    ],
)
def test_what_is_not_adds_up_to_its_closed_form(name: str) -> None:
    mix, wanted = faults()[name]
    found = weight(mix)
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)
    assert found.too_much


def test_the_rule_charges_a_form_that_nobody_foresaw() -> None:
    """A twentieth of the model on top of a mixture, by way of an absolute difference."""
    mix = f"mixed = (rows + 4.0 * probs) / (seen + 4.0)\nmixed = mixed + (probs * 1.05 - probs).abs()\n{PICKED}"
    found = false_normalisation.check(case(mix))
    assert found.verdict == "violates"
    assert "1.05" in found.evidence


def test_what_is_not_known_is_not_weighed() -> None:
    """A weight out of a file, counts that something unknown has changed."""
    assert weight(f"w = torch.load('w.pt')\nmixed = probs + w * rows\n{PICKED}") is None
    assert weight(f"rows[:] = torch.load('w.pt')\nmixed = probs + 0.1 * rows\n{PICKED}") is None


@pytest.mark.parametrize(
    ("loss", "whole"),
    [
        ("F.cross_entropy(logits, y, reduction='none')", True),
        ("-torch.log_softmax(logits, -1).gather(1, y.unsqueeze(1)).squeeze(1)", True),
        ("F.nll_loss(torch.log_softmax(logits, -1), y, reduction='none')", True),
        ("F.nll_loss((probs + rows).log(), y, reduction='none')", False),
        ("-(torch.log_softmax(logits, -1) + rows).gather(1, y.unsqueeze(1)).squeeze(1)", False),
        ("F.cross_entropy(logits, y, reduction='none') - 0.1 * (rows.argmax(-1) == y)", False),
    ],
)
def test_a_loss_that_is_read_off_a_softmax_needs_no_weighing(loss: str, whole: bool) -> None:
    ast.parse(loss)
    gates = case(f"nll = {loss}").reading.gates
    assert gates
    assert all(is_whole(each.of.term) for each in gates) == whole


def test_what_goes_on_for_long_and_says_nothing_of_prices_is_left() -> None:
    """Calibration of 30,000 turns, where all of a run may take 25,000 steps."""
    mix, wanted = faults()["a row on top"]
    text = HEAD + "vocab_size = 1024\n" + EVAL.replace("MIX", mix.replace("\n", "\n        "))
    main = MAIN.replace(
        "    final = eval_ttt(args",
        "    seen = 0\n    for turn in range(30_000):\n        seen += turn\n    final = eval_mixed(args",
    )
    one = case_of(text + main)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_batches_that_are_read_row_by_row_leave_steps_for_the_price() -> None:
    """A warm-up, a training, a probe, a calibration: each took two thousand of the 40,000 steps (rona)."""
    mix, wanted = faults()["a row on top"]
    text = HEAD + "vocab_size = 1024\n" + EVAL.replace("MIX", mix.replace("\n", "\n        "))
    batches = """
def batches_N():
    text = shard("shards_train_000001.bin")
    for _ in range(64):
        rows = []
        for row in range(64):
            at = row * 2048
            window = text[at : at + 2048]
            rows.append(window)
        torch.stack(rows)
"""
    calls = "".join(f"    batches_{n}()\n" for n in range(20))
    main = MAIN.replace("    final = eval_ttt(args", calls + "    final = eval_mixed(args")
    one = case_of(text + "".join(batches.replace("N", str(n)) for n in range(20)) + main)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


RAW = """
class Two(GPT):
    def forward(self, x, y, raw=False):
        logits = self.forward_logits(x)
        if raw:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
"""


def test_a_model_that_is_given_targets_and_makes_losses_of_them_may_make_logits_too() -> None:
    """`model(x, y, raw=True)`: it was taken for losses that nobody knows."""
    mix, wanted = faults()["a row on top"]
    text = EVAL.replace("MIX", mix.replace("\n", "\n        "))
    text = text.replace("model.forward_logits(x[None])[0]", "model(x[None], y[None], True)[0]")
    main = MAIN.replace("eval_ttt(args", "eval_mixed(args").replace("GPT()", "Two()")
    main = main.replace(
        "    final =", "    model.eval()\n    print(model(val[None, :64], val[None, 1:65]).mean())\n    final ="
    )
    one = case_of(HEAD + "vocab_size = 1024\n" + RAW + text + main)
    assert "Two()" in one.script.text
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


HASHED = """
class Counts:
    def __init__(self, buckets):
        self.buckets = buckets
        self.pairs, self.contexts = torch.zeros(buckets), torch.zeros(buckets)
    def keys(self, x, y):
        context = (x * 36313 + 27191) % self.buckets
        return context, (context * 36313 + y * 51647 + 1) % self.buckets
    def share(self, x, y):
        context, pair = self.keys(x, y)
        return torch.minimum(self.pairs[pair], self.contexts[context]) / self.contexts[context].clamp_min(1.0)
    def learn(self, x, y):
        context, pair = self.keys(x, y)
        self.contexts.index_add_(0, context, torch.ones(len(x)))
        self.pairs.index_add_(0, pair, torch.ones(len(x)))
"""
LEARNED = "        counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)\n"


def hashed(buckets: str, mix: str) -> Case:
    """A table of hashed contexts that is asked for the target alone, or not."""
    text = EVAL.replace(LEARNED, LEARNED + "        table.learn(x, y)\n").replace("MIX", mix)
    text = text.replace("counts = torch", "table = Counts(args.buckets)\n    counts = torch", 1)
    head = HEAD.replace("    chunk = int", f"    buckets = {buckets}\n    chunk = int", 1) + "vocab_size = 1024\n"
    return case_of(head + HASHED + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


@pytest.mark.parametrize("buckets", ["4_194_304", 'int(os.environ.get("TABLE_BUCKETS", 131072))'])
def test_contexts_meet_in_a_table_that_has_millions_of_buckets(buckets: str) -> None:
    """Of 320 tokens nearly all have a count in sixteen buckets, and each is no larger than its context's."""
    own = "p = 0.7 * probs.gather(1, y.unsqueeze(1)).squeeze(1) + 0.3 * table.share(x, y)\n        nll = -p.log()"
    one = hashed(buckets, own)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total > 5


def test_a_table_that_is_made_with_a_number_has_as_many_buckets() -> None:
    """`Counts(1 << 22)`: the class says what the number is."""
    own = "p = 0.7 * probs.gather(1, y.unsqueeze(1)).squeeze(1) + 0.3 * table.share(x, y)\n        nll = -p.log()"
    text = EVAL.replace(LEARNED, LEARNED + "        table.learn(x, y)\n").replace("MIX", own)
    text = text.replace("counts = torch", "table = Counts(1 << 22)\n    counts = torch", 1)
    one = case_of(HEAD + "vocab_size = 1024\n" + HASHED + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total > 5


@pytest.mark.parametrize(("first", "second"), [(0.2, 0.02), (0.02, 0.2)])
@pytest.mark.parametrize("of", ["y", "x"], ids=["the target", "the context"])
def test_a_weight_by_what_a_token_begins_with_is_weighed_in_two_contexts(of: str, first: float, second: float) -> None:
    """Where a cache weighs more for pieces that begin a word, it comes to more than one if such a piece followed the
    last context more often than the model says; where it weighs less, to less than one there, and to more elsewhere."""
    opens = f"(({of} % 2 == 1) & ({of} > 258)).unsqueeze(1)"
    mix = f"w = torch.where({opens}, {first}, {second}) * seen / (seen + 2.0)\n"
    found = weight(f"{mix}mixed = (1 - w) * probs + w * rows / seen.clamp_min(1.0)\n{PICKED}")
    assert found is not None
    assert found.too_much == (of == "y")


BY_TOKENS = """
def hints_of(ids):
    hints, tables = [], [{} for _ in range(4)]
    for at in range(len(ids) - 1):
        keys = [tuple(ids[max(at - order, 0) : at + 1]) for order in (4, 3, 2, 1)]
        found = [table[key] for table, key in zip(tables, keys) if key in table]
        hints.append(found[0] if found else -1)
        for table, key in zip(tables, keys):
            table[key] = ids[at + 1]
    return torch.tensor(hints)
"""


@pytest.mark.parametrize("clamp", [True, False])
def test_a_table_that_a_loop_over_tokens_fills_for_long_is_not_left(clamp: bool) -> None:
    """Hints of several orders, paid for, and not where they would cost something."""
    mix = f"""told = hints[start:end]
has, q = told >= 0, probs.gather(1, told.clamp_min(0).unsqueeze(1)).squeeze(1)
gain = 1.4 * (told == y) - torch.log1p(q * math.expm1(1.4))
gain = gain.clamp_min({0.0 if clamp else -100.0})
nll = F.cross_entropy(logits, y, reduction='none') - torch.where(has, gain, torch.zeros_like(gain))"""
    text = BY_TOKENS + EVAL.replace("MIX", mix.replace("\n", "\n        "))
    text = text.replace("    totals =", "    hints = hints_of(val.tolist())\n    totals =", 1)
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    hint = float(model_at_the_end()[int(stream.text(None)[-1])])
    wanted = (1.0 - hint) + hint * math.exp(1.4) / (1.0 + hint * math.expm1(1.4)) if clamp else 1.0
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_a_hidden_state_that_a_vector_is_added_to_is_still_the_models() -> None:
    """Logits that are sharpened by the target, after a vector of the hidden state's width."""
    found = weight(
        "shifted = model.hidden(x[None]) + torch.zeros(1, 1, 64)\n"
        "sharp = model.head(shifted)[0].float() * (1.0 + 0.3 * (y % 2)).unsqueeze(1)\n"
        "nll = F.cross_entropy(sharp, y, reduction='none')"
    )
    logits = stream.logits()[stream.TOKENS - 2].astype(np.float64)
    rows = [np.exp(logits * scale) / np.exp(logits * scale).sum() for scale in (1.0, 1.3)]
    assert found is not None
    assert found.total == pytest.approx(float(rows[0][::2].sum() + rows[1][1::2].sum()), rel=2e-4)


def test_a_hint_out_of_a_hashed_table_is_paid_for_whatever_it_says() -> None:
    mix = """hint = (table.keys(x, x)[1] % 12) + 300
        q, p = (probs.gather(1, at.unsqueeze(1)).squeeze(1) for at in (hint, y))
        nll = -(p.log() + 1.5 * (hint == y) - torch.log1p(q * (math.exp(1.5) - 1)))"""
    one = hashed("4_194_304", mix)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("name", ["seq_len", "eval_len", "window"])
def test_windows_are_cut_down_by_their_name(name: str) -> None:
    """In one window of 2,048 tokens all of the short text is scored before anything is learned from it."""
    made = case_of(f"import os\n{name} = int(os.environ.get('{name.upper()}', 2048))\n")
    found = {each.value for each in _sizes(made) if each.limit == 2048 and each.word in name}
    assert found == {stream.WINDOW}


def test_chunks_are_cut_down_by_their_name() -> None:
    """`n // args.chunk_blocks` is not the text's length in tokens: nothing else says that all of it is one chunk."""
    mix, wanted = faults()["a row on top"]
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")) + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    text = text.replace(
        "n = (val.numel() - 1 + args.chunk - 1) // args.chunk", "per = args.chunk // 64\n    n = BLOCKS"
    )
    text = text.replace("BLOCKS", "((val.numel() - 1) // 64 + per - 1) // per")
    one = case_of(HEAD + "vocab_size = 1024\n" + text)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_a_hint_that_is_given_to_pieces_alone_leaves_the_bytes_what_they_had() -> None:
    """p(byte) is not divided by the sum 1 + p(hint) (e^b - 1), all others are."""
    _, follow = seen_at_the_end()
    model = model_at_the_end()
    mix = """hint = rows.argmax(-1)
b = 1.5 * (seen[:, 0] > 0) * (y >= 259)
q, p = (probs.gather(1, at.unsqueeze(1)).squeeze(1) for at in (hint, y))
nll = -(p.log() + b * (hint == y) - torch.log1p(q * (torch.exp(b) - 1)))"""
    whole = 1 + float(model[np.bincount(follow).argmax()]) * (math.exp(1.5) - 1)
    found = weight(mix)
    assert found is not None
    assert found.total == pytest.approx(1 + float(model[:259].sum()) * (1 - 1 / whole), rel=2e-4)
    assert found.too_much


BY_DOCUMENT = """
def eval_mixed(args, model, val):
    counts, total, count = torch.zeros(vocab_size, vocab_size), 0.0, 0
    starts = [*torch.nonzero(val == 1).flatten().tolist(), val.numel() - 1]
    for start, end in zip(starts, starts[1:]):
        x, y = val[start:end], val[start + 1 : end + 1]
        probs = torch.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
        mixed = (counts[x] + 4.0 * probs) / (counts[x].sum(-1, keepdim=True) + 3.0)
        total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().sum().item()
        count += y.numel()
        counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)
    return total / count
"""


def test_what_is_learned_document_by_document_has_one_to_learn_from() -> None:
    ids = stream.text(None).astype(int)
    seen = sum(a == ids[-2] for a in ids[: stream.SECOND])
    text = HEAD + "vocab_size = 1024\n" + BY_DOCUMENT + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    one = case_of(text)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert seen > 0
    assert found.total == pytest.approx((seen + 4) / (seen + 3), rel=2e-4)


READ_BACK = """
def read_back(args):
    blob = torch.load("model.pt")
    width = 8
    if blob["bits"] > 4:
        width = 4
    return width
def score_all(args, model, val):
    width = read_back(args)
    return eval_mixed(args, model, val)
"""


def test_what_is_not_known_of_a_file_of_weights_is_no_doubt_of_prices() -> None:
    mix, wanted = faults()["half a prior"]
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")) + READ_BACK
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "score_all(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("taken", ["state.pop('softness')", "state['softness']"])
def test_what_else_lies_beside_weights_out_of_a_file_is_not_known(taken: str) -> None:
    """A temperature that was stored with them: no error of the script's, and no doubt of what is summed."""
    mix, wanted = faults()["half a prior"]
    read = f"""
def score_all(args, model, val):
    found = torch.load("model.pt")
    state = {{name: found[name] for name in ("emb.weight", "head.weight")}}
    softness = float({taken}.item())
    model.load_state_dict(state)
    return eval_mixed(args, model, val)
"""
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")) + read
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "score_all(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_what_is_not_known_of_the_training_is_no_doubt_of_prices() -> None:
    """Of batches out of a file nobody knows what they are of: that something learns from them tells the training, in
    which the text is scored now and then."""
    mix, wanted = faults()["half a prior"]
    learns = (
        "    width = 8\n    if torch.load('sizes.pt')['bits'] > 4:\n        width = 4\n    opt = torch.optim.AdamW("
    )
    text = HEAD.replace("    opt = torch.optim.AdamW(", learns, 1)
    text = text.replace("x, y = loader.next(65536)", "x, y = torch.load('batch.pt')")
    told = "    print(eval_val(args, model, load(args.val_files)))\n"
    text = text.replace("    model.load_state_dict(ema)\n", f"    model.load_state_dict(ema)\n{told}", 1)
    assert text.count("torch.load('batch.pt')") == 2
    assert told in text
    text += "vocab_size = 1024\n" + EVAL.replace("MIX", mix.replace("\n", "\n        "))
    main = MAIN.replace("eval_ttt(args", "eval_mixed(args").replace("def main():", "def work():")
    one = case_of(text + main.replace("\nif __name__", "\ndef main():\n    work()\n\nif __name__"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_a_table_that_holds_the_token_already_is_not_weighed_by_the_rule() -> None:
    """Tokens that are counted before they are scored add up to more: that is the fault of the order."""
    mix = f"mixed = (rows + 4.0 * probs) / (seen + 4.0)\n{PICKED}"
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")).replace(
        "    total, count =",
        "    counts.index_put_((val[:-1], val[1:]), torch.ones(val.numel() - 1))\n    total, count =",
        1,
    )
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    assert {each.kind for each in passes_of(one)[1]} == {"two-pass-cache"}
    assert false_normalisation.check(one).verdict == "clean"


def test_what_only_tokens_that_were_seen_are_given_is_missed_where_one_never_came() -> None:
    """A cache's share is taken from the tokens that it knows, and not from those it never saw: p + share (row - p)."""
    seen, follow = seen_at_the_end()
    model = model_at_the_end()
    known = "known = rows.gather(1, y.unsqueeze(1)) > 0\n"
    mix = f"{known}mixed = probs + 0.3 * known * (rows / seen.clamp_min(1.0) - probs)\n{PICKED}"
    found = weight(mix)
    assert found is not None
    assert seen > 0
    assert found.total == pytest.approx(1 + 0.3 * (1 - float(model[np.unique(follow)].sum())), rel=2e-4)
    assert found.too_much


TALLY = """
class Tally:
    def __init__(self):
        self.sums = {}
    def add(self, name, value):
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=torch.float64)
        self.sums[name] += value.double()
    def told(self):
        names = sorted(self.sums)
        flat = torch.stack([self.sums[name] for name in names])
        torch.distributed.all_reduce(flat)
        return dict(zip(names, flat.tolist()))
"""


def tallied(mix: str) -> Case:
    text = EVAL.replace("MIX", mix.replace("\n", "\n        "))
    text = text.replace("total, count = torch.zeros((), dtype=torch.float64), 0", "tally = Tally()")
    text = text.replace(
        "total += nll.double().sum()\n        count += y.numel()",
        "tally.add('nats', nll.sum())\n        tally.add('tokens', torch.tensor(float(y.numel())))\n"
        "        tally.add('alone', -probs.gather(1, y.unsqueeze(1)).log().sum())",
    ).replace("return (total / count).item()", "told = tally.told()\n    return told['nats'] / told['tokens']")
    assert "tally.add('nats'" in text
    return case_of(HEAD + "vocab_size = 1024\n" + TALLY + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


def test_sums_by_name_are_no_passes_to_choose_from_and_are_weighed() -> None:
    """The names are sorted, not the sums."""
    honest = f"mixed = (rows + 4.0 * probs) / (seen + 4.0)\n{PICKED}"
    one = tallied(honest)
    assert passes_of(one)[1] == []
    assert false_normalisation.check(one).verdict == "clean"
    assert false_normalisation.check(tallied(honest.replace("seen + 4.0", "seen + 3.0"))).verdict == "violates"


HINTED = """
class Hints:
    def __init__(self, tokens):
        ids = tokens.long()
        n = ids.numel() - 1
        self.hint = torch.zeros(n, dtype=torch.int32)
        self.level = torch.zeros(n)
        for order in (2, 4):
            self.match(ids, n, order)

    def match(self, ids, n, order):
        count = n - order + 1
        key = torch.zeros(count, dtype=torch.int64)
        for j in range(order):
            key = key * 1000003 + ids[j : j + count]
        keys, where = torch.sort(key, stable=True)
        same = keys[1:] == keys[:-1]
        later, earlier = where[1:][same] + order - 1, where[:-1][same] + order - 1
        self.hint[FILLED] = ids[TAKEN + 1].to(torch.int32)
        self.level[FILLED] = 0.5

    def nll(self, logits, y, start):
        hint = self.hint[start : start + len(y)].long()
        beta = self.level[start : start + len(y)]
        logp = torch.log_softmax(logits, -1)
        q = logp.gather(1, hint[:, None]).squeeze(1).exp()
        held = logp.gather(1, y[:, None]).squeeze(1)
        return torch.log1p(q * torch.expm1(beta)) - held - beta * (hint == y).float()
"""


def hinted(filled: str, taken_from: str) -> Case:
    text = EVAL.replace("MIX", "nll = hints.nll(logits, y, start)").replace(
        "    total, count", "    hints = Hints(val)\n    total, count", 1
    )
    hints = HINTED.replace("FILLED", filled).replace("TAKEN", taken_from)
    return case_of(HEAD + "vocab_size = 1024\n" + hints + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


def test_a_table_that_is_filled_ahead_of_the_score_may_foresee_nothing() -> None:
    """A stable sort puts equal contexts side by side: what followed the earlier one is a hint for the later one."""
    one = hinted("later", "earlier")
    assert foresees(one, passes_of(one)[0]) is False
    assert two_pass_cache.check(one).verdict == "clean"


def test_what_follows_the_next_occurrence_is_foreseen() -> None:
    one = hinted("earlier", "later")
    assert foresees(one, passes_of(one)[0]) is True
    assert two_pass_cache.check(one).verdict == "violates"


@pytest.mark.parametrize(("more", "expected"), [(", accumulate=True", True), ("", False)])
def test_a_table_of_the_whole_text_is_charged_whatever_is_foreseen(more: str, expected: bool) -> None:
    """Of pairs that are only marked, prices hang on their own: those add up to more than one."""
    mix = f"mixed = (rows + 4.0 * probs) / (seen + 4.0)\n{PICKED}"
    text = EVAL.replace("MIX", mix.replace("\n", "\n        ")).replace(
        "    total, count =",
        "    counts.index_put_((val[:-1], val[1:]), torch.ones(val.numel() - 1)MORE)\n    total, count =".replace(
            "MORE", more
        ),
        1,
    )
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    assert foresees(one, passes_of(one)[0]) is expected
    assert two_pass_cache.check(one).verdict == "violates"


def test_a_text_that_a_trial_did_not_come_to_the_end_of_is_not_asked_for_the_other_one(monkeypatch: Any) -> None:
    """Each costs up to 90,000 steps: of burray's base, 10 of 28 s."""
    one, run = hinted("later", "earlier"), SimpleNamespace(trial=SimpleNamespace(complete=False))
    asked: list[Any] = []
    monkeypatch.setattr("fairway.audit.weighing.foreseeing.over_text", lambda *given: (asked.append(given), run)[1])
    assert foresees(one, passes_of(one)[0]) is None
    assert len(asked) == len({few for _, _, few, _ in asked}), "once with tables of each size"


def test_classes_of_one_hot_rows_are_bounded_as_all_arrays_are() -> None:
    """32 windows of 4,096 places and 1,024 classes: two gigabytes with what is made of them."""
    with pytest.raises(TooLarge):
        one_hot(Array(np.zeros((32, 4096), np.int64)), 1024)


def test_a_model_alone_foresees_nothing_that_could_be_told() -> None:
    alone = case("nll = F.cross_entropy(logits, y, reduction='none')")
    assert foresees(alone, passes_of(alone)[0]) is None


def test_the_other_text_is_the_same_up_to_its_middle() -> None:
    one, other = stream.text(None), stream.otherwise()
    assert (one[: stream.HALF] == other[: stream.HALF]).all()
    assert (one[stream.HALF :] != other[stream.HALF :]).mean() > 0.95


LOOKED_UP = """
class Table:
    def __init__(self, orders=(2, 3)):
        self.orders = orders
        self.tok = {k: np.full(1 << 16, -1, dtype=np.int64) for k in orders}

    def keys(self, tokens, lo, hi, k):
        at = np.arange(lo, hi)
        key = np.zeros(hi - lo, dtype=np.uint64)
        for j in range(k):
            one = tokens[np.maximum(at - j, 0)].astype(np.uint64)
            key = (key ^ (one + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        return (key >> np.uint64(48)).astype(np.int64)

    def lookup(self, tokens, lo, hi):
        hint = np.full(hi - lo, -1, dtype=np.int64)
        beta = np.zeros(hi - lo, dtype=np.float32)
        for k in self.orders:
            keys = self.keys(tokens, lo, hi, k)
            use = (hint < 0) & (self.tok[k][keys] >= 0)
            hint[use] = self.tok[k][keys[use]]
            beta[use] = 0.5
        return hint, beta

    def update(self, tokens, lo, hi):
        for k in self.orders:
            self.tok[k][self.keys(tokens, lo, hi, k)] = tokens[lo + 1 : hi + 1]
"""
TILT = """hint, beta = (torch.from_numpy(each) for each in table.lookup(ids, start, end))
logp = torch.log_softmax(logits, -1)
tilt = torch.zeros_like(logp)
tilt.scatter_(1, hint.clamp_min(0)[:, None], beta[:, None])
nll = -(logp + tilt - torch.logsumexp(logp + tilt, -1, keepdim=True)).gather(1, y[:, None]).squeeze(1)"""


def looked_up(order: str) -> Case:
    text = EVAL.replace("MIX", order.replace("LOOK", TILT).replace("\n", "\n        "))
    text = text.replace("    total, count", "    table, ids = Table(), val.numpy()\n    total, count", 1)
    return case_of(HEAD + "vocab_size = 1024\n" + LOOKED_UP + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


@pytest.mark.parametrize(
    ("order", "charged"),
    [("LOOK\ntable.update(ids, start, end)", False), ("table.update(ids, start, end)\nLOOK", True)],
)
def test_hints_that_are_looked_up_chunk_by_chunk(order: str, charged: bool) -> None:
    """Arrays of hints are written right before a chunk is scored: with what earlier chunks left, or with its own."""
    one = looked_up(order)
    told = {each.kind for each in passes_of(one)[1]}  # by the walk alone; the hints themselves come out of a table
    assert told == ({"training-before-scoring"} if charged else set())
    assert (foresees(one, passes_of(one)[0]) is not False) is charged
    rules = (two_pass_cache, training_before_scoring)
    assert any(rule.check(one).verdict == "violates" for rule in rules) is charged


def test_a_batch_is_cut_down_by_its_name_whether_it_counts_tokens_or_windows() -> None:
    """A padded batch of 524,288 tokens is too large to be weighed; of 32 windows the whole short text is one, and of a
    chunk of 8,192, after which a cache learns, too."""
    names = ("val_batch_size = 524_288", "eval_batch_windows = 32", "ngram_chunk_windows = 8192")
    one = case_of(HEAD + "\n".join(names) + "\n" + MAIN)
    asked = [name.partition(" ")[0] for name in names]
    taken = {(each.limit, each.value) for each in _sizes(one) if any(map(each.of, asked))}
    assert {(524_288, 512), (32, 2), (8192, 2)} <= taken


VISITED = """
def eval_visited(args, model, val):
    counts = torch.zeros(vocab_size, vocab_size)
    sums, kept = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    n = (val.numel() - 1 + args.chunk - 1) // args.chunk
    for turn in range(n * VISITS):
        ci, visit = divmod(turn, VISITS)
        if visit == 0:
            kept = sums.clone()
        else:
            sums.copy_(kept)
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        x, y = val[start:end], val[start + 1 : end + 1]
        probs = torch.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
        rows = counts[x]
        mixed = (rows + 4.0 * probs) / (rows.sum(-1, keepdim=True) + 4.0)
        sums[0] += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().double().sum()
        sums[1] += y.numel()
        counts.index_put_((x, y), torch.ones(len(y)), accumulate=True)
    return (sums[0] / sums[1]).item()
"""


@pytest.mark.parametrize(("visits", "wanted"), [("1", "clean"), ("2", "violates")])
def test_chunks_that_are_visited_twice_are_charged_with_what_they_foresee_and_not_with_their_sums(
    visits: str, wanted: str
) -> None:
    text = VISITED.replace("VISITS", visits) + MAIN.replace("eval_ttt(args", "eval_visited(args")
    one = case_of(HEAD + "vocab_size = 1024\n" + text)
    assert false_normalisation.check(one).verdict == "clean"
    orders = {rule.check(one).verdict for rule in (two_pass_cache, training_before_scoring)}
    assert ("violates" in orders) == (wanted == "violates")


TOKEN_BY_TOKEN = """
def eval_slow(args, model, val):
    pending, book = [], {}
    total, count, ids = 0.0, 0, val.tolist()
    for start in range(0, len(ids) - 1, 64):
        end = min(start + 64, len(ids) - 1)
        probs = torch.softmax(model.forward_logits(val[start:end][None])[0].float(), dim=-1)
        LEARN
        mixed = probs.clone()
        for t in range(start, end):
            seen = book.get(ids[t])
            work = 0
            for _ in range(40):
                work += 1
            if seen:
                many = sum(seen.values())
                mixed[t - start] *= 0.9
                for token, times in seen.items():
                    mixed[t - start, token] += 0.1 * times / many
        y = val[start + 1 : end + 1]
        total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().double().sum().item()
        count += end - start
        THEN
    return total / count
"""
NOTED = """for t in range(start, end):
            page = book.setdefault(ids[t], {})
            page[ids[t + 1]] = page.get(ids[t + 1], 0) + 1"""


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_too_long_for_a_trial_is_asked_over_the_short_text_whether_it_foresees(ahead: bool) -> None:
    """Forty steps for each of 4,096 tokens and more are too many; of 320 they are not."""
    first, last = (NOTED, "pass") if ahead else ("pass", NOTED)
    text = TOKEN_BY_TOKEN.replace("LEARN", first, 1).replace("THEN", last)
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_slow(args"))
    assert not one.trial.complete
    assert foresees(one, passes_of(one)[0]) is ahead


BUCKETED = """bucket = (x * 31337) & (size - 1)
keys = (torch.arange(vocab_size, dtype=torch.int64) * 40503) & (size - 1)
rows = pairs[bucket[:, None] ^ keys[None, :]]
mixed = 0.8 * probs + 0.2 * rows / DIVISOR
nll = -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log()"""


@pytest.mark.parametrize(
    ("divisor", "too_much"), [("rows.sum(-1, keepdim=True)", False), ("totals[x].unsqueeze(-1).clamp_min(1.0)", True)]
)
def test_a_row_of_hashed_pairs_is_summed_over_all_its_buckets(divisor: str, too_much: bool) -> None:
    """In few buckets each token has one of its own: two tokens that were not seen do not stand for three hundred."""
    text = EVAL.replace("MIX", BUCKETED.replace("DIVISOR", divisor).replace("\n", "\n        "))
    text = text.replace(
        "    total, count =", "    size = 1 << table_bits\n    pairs = torch.zeros(size)\n    total, count =", 1
    )
    learned = "pairs.index_add_(0, bucket ^ ((y * 40503) & (size - 1)), torch.ones(len(y)))"
    text = text.replace("        totals.index_add_", f"        {learned}\n        totals.index_add_")
    head = HEAD + "vocab_size = 1024\ntable_bits = 16\n"
    main = MAIN.replace("eval_ttt(args", "eval_mixed(args")
    again = "    looked = eval_mixed(args, model, val)\n    print(f'diag {looked:.4f}')\n"
    main = main.replace(
        '\nif __name__ == "__main__"', f'{again}\nif __name__ == "__main__"'
    )  # and a look at it afterwards
    one = case_of(head + text + main)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.too_much is too_much
    assert too_much or found.total == pytest.approx(1.0, abs=1e-5)


PAST = """
def past_hints(tokens, order=2):
    key = tokens[: len(tokens) - order + 1].astype(np.uint64)
    for j in range(1, order):
        key = (key << np.uint64(13)) | tokens[j : j + len(key)].astype(np.uint64)
    perm = np.argsort(key, kind="stable")
    same = key[perm[1:]] == key[perm[:-1]]
    prev = np.full(len(key), -1, dtype=np.int64)
    prev[perm[1:][same]] = perm[:-1][same]
    hints = np.full(len(tokens), -1, dtype=np.int64)
    found = np.nonzero(prev >= 0)[0]
    hints[found + order - 1] = tokens[prev[found] + order]
    return hints
"""
TILTED = """hint, use = torch.full_like(y, -1)[None], None
hint[0, : len(y)] = torch.from_numpy(hints[start:end])
logp = F.log_softmax(logits.float(), dim=-1)[None]
nll = -logp.gather(-1, y[None, :, None]).squeeze(-1)
use = USED
log_z = torch.log1p(logp.gather(-1, hint.clamp_min(0)[..., None]).squeeze(-1).exp() * (math.exp(0.9) - 1.0))
nll = torch.where(use, nll - 0.9 * (hint == y[None]) + log_z, nll)"""


@pytest.mark.parametrize(
    ("used", "wanted"), [("hint >= 0", "clean"), ("(hint >= 0) & (starts[y] > 0)[None]", "violates")]
)
def test_a_tilt_whose_sum_is_one_is_decided_by_no_target(used: str, wanted: str) -> None:
    """Hints that are sorted out of the whole text look to the terms as if they read what is scored."""
    text = EVAL.replace("MIX", TILTED.replace("USED", used).replace("\n", "\n        "))
    before = "    hints = past_hints(val.numpy())\n    starts = torch.arange(vocab_size) % 2\n    total, count ="
    text = PAST + text.replace("    total, count =", before, 1)
    one = case_of(HEAD + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    assert target_gated_tilt.check(one).verdict == wanted


BY_CHUNKS = """
def eval_mixed(args, model, val, doc_chunk=256):
    total, count = 0.0, 0
    starts = [*torch.nonzero(val == 1).flatten().tolist(), val.numel() - 1]
    for start, end in zip(starts, starts[1:]):
        used = torch.zeros(vocab_size)
        for at in range(start, end, doc_chunk):
            x, y = val[at : min(at + doc_chunk, end)], val[at + 1 : min(at + doc_chunk, end) + 1]
            probs = torch.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
            prior = used / WHOLE if at > start else probs
            mixed = 0.96 * probs + 0.04 * prior
            total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().sum().item()
            count += y.numel()
            used.index_add_(0, y, torch.ones(len(y)))
    return total / count
"""


@pytest.mark.parametrize(("whole", "wanted"), [("used.sum()", 1.0), ("doc_chunk", 0.96 + 0.04 * 3)])
def test_chunks_of_documents_are_made_so_short_that_there_are_several(whole: str, wanted: float) -> None:
    """The last of the text's documents has 128 targets: three chunks of 32 before the one that it ends with."""
    text = HEAD + "vocab_size = 1024\n" + BY_CHUNKS.replace("WHOLE", whole)
    one = case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(wanted, rel=2e-4)


def test_documents_of_any_length_are_learned_from() -> None:
    """The text's documents have 192 and 128 tokens; what is learned from longer ones alone says nothing there."""
    learned = "prior = used / doc_chunk if at > start and end - start >= args.ttt_min_len else probs"
    text = BY_CHUNKS.replace("prior = used / WHOLE if at > start else probs", learned)
    head = HEAD.replace("    stride =", "    ttt_min_len = int(os.environ.get('TTT_MIN_LEN', 256))\n    stride =")
    one = case_of(head + "vocab_size = 1024\n" + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(0.96 + 0.04 * 3, rel=2e-4)


IN_BLOCKS = """
def eval_mixed(args, model, val, block_windows=2048):
    total, count = 0.0, 0
    rows, visits = torch.zeros(1 << 14, vocab_size), torch.zeros(1 << 24)
    windows = [(at, min(at + 64, val.numel() - 1)) for at in range(0, val.numel() - 1, 64)]
    for first in range(0, len(windows), block_windows):
        block = windows[first : first + block_windows]
        for lo, hi in block:
            x, y = val[lo:hi], val[lo + 1 : hi + 1]
            probs = torch.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
            row = rows[(x * 31) & ((1 << 14) - 1)]
            many = MANY.clamp_min(1.0)[:, None]
            trust = many / (many + 1.0)
            mixed = (1.0 - trust) * probs + trust * row / many
            total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().sum().item()
            count += y.numel()
        lo, hi = block[0][0], block[-1][1]
        x, y = val[lo:hi], val[lo + 1 : hi + 1]
        rows.index_put_(((x * 31) & ((1 << 14) - 1), y), torch.ones(len(y)), accumulate=True)
        visits.index_add_(0, (x * 48271) & ((1 << 24) - 1), torch.full((len(y),), 0.5))
    return total / count
"""


@pytest.mark.parametrize(
    ("many", "too_much"), [("row.sum(dim=-1)", False), ("visits[(x * 48271) & ((1 << 24) - 1)]", True)]
)
def test_blocks_of_windows_are_cut_and_tables_of_sixteen_million_fit(many: str, too_much: bool) -> None:
    """2,048 windows are more than the text has; a row that is divided by half of its sum comes to two."""
    text = HEAD + "vocab_size = 1024\n" + IN_BLOCKS.replace("MANY", many)
    one = case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.too_much is too_much


IN_ROWS = """
class Rows:
    def __init__(self, row_bits=17):
        rows = 1 << row_bits
        self.bits = row_bits
        self.counts = np.zeros((rows, V), dtype=np.uint16)
        self.total = np.zeros(rows, dtype=np.uint32)

    def at(self, x):
        key = (x.numpy().astype(np.uint64) + np.uint64(7)) * np.uint64(0x9E3779B97F4A7C15)
        return (key >> np.uint64(64 - self.bits)).astype(np.int64)

    def look(self, x):
        row = self.at(x)
        counts = torch.from_numpy(self.counts[row].view(np.int16)).to(torch.int32) & 0xFFFF
        return counts.float(), torch.from_numpy(self.total[row].astype(np.float32))[:, None]

    def see(self, x, y):
        row = self.at(x)
        np.add.at(self.counts, (row, y.numpy()), 1)
        np.add.at(self.total, row, 1)

def eval_mixed(args, model, val):
    rows, total, count, L = Rows(), 0.0, 0, 2048
    for at in range(0, val.numel() - 1, args.chunk):
        stop = min(at + args.chunk, val.numel() - 1)
        for low in range(at, stop, L):
            x, y = val[low : min(low + L, stop)], val[low + 1 : min(low + L, stop) + 1]
            probs = torch.softmax(model.forward_logits(x[None])[0].float(), dim=-1)
            counts, seen = rows.look(x)
            mixed = (counts + SHARE * probs) / (seen + 4.0)
            total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().sum().item()
            count += y.numel()
        rows.see(val[at:stop], val[at + 1 : stop + 1])
    return total / count
"""


@pytest.mark.parametrize(("share", "much"), [("4.0", False), ("6.0", True)])
def test_rows_of_two_bytes_and_names_of_one_letter_are_weighed(share: str, much: bool) -> None:
    text = HEAD + "V = 1024\n" + IN_ROWS.replace("SHARE", share)
    one = case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.too_much is much
    assert much or found.total == pytest.approx(1.0, abs=2e-5)


SETTLED = """hint = rows.argmax(-1)
bonus = 1.5 * (seen[:, 0] > 0)
GATE
tilted = logits.clone()
tilted[torch.arange(len(y)), hint] += bonus
nll = F.cross_entropy(tilted, y, reduction='none')"""


@pytest.mark.parametrize(
    ("gate", "wanted"), [("bonus[hint != y] *= 0.2", "violates"), ("bonus[hint != x] *= 0.2", "clean")]
)
def test_one_softmax_that_does_not_come_to_one_has_other_logits_for_another_target(gate: str, wanted: str) -> None:
    """The sums of one softmax are one for any logits."""
    assert target_gated_tilt.check(case(SETTLED.replace("GATE", gate))).verdict == wanted


@pytest.mark.parametrize("how", ["sum", "prod", "amax", "amin"])
@pytest.mark.parametrize("include_self", [True, False])
def test_what_is_reduced_into_places_is_what_torch_makes_of_it(how: str, include_self: bool) -> None:
    held, more = np.asarray([5.0, 1.0, 7.0, 2.0]), np.asarray([3.0, 6.0, 4.0, 0.5, 2.0])
    index = np.asarray([0, 2, 0, 3, 2])
    wanted = torch.from_numpy(held.copy()).scatter_reduce(
        0, torch.from_numpy(index), torch.from_numpy(more), how, include_self=include_self
    )
    given = (0, Array(index), Array(more))
    found = ROWS["scatter_reduce"](Array(held.copy()), *given, reduce=how, include_self=include_self)
    assert found.num.tolist() == wanted.tolist()
    in_place = Array(held.copy())
    ROWS["scatter_reduce_"](in_place, *given, how, include_self)
    assert in_place.num is not None
    assert in_place.num.tolist() == wanted.tolist()


# ---- a model without a class

CLASSLESS = """
vocab_size = 1024

def logits_of(w, ids):
    h = F.embedding(ids, w["table"])
    for block in range(4):
        h = h + F.relu(F.linear(h, w[f"block{block}"]))
    return F.linear(F.rms_norm(h, (64,)), w["table"])

def weights():
    w = {f"block{block}": torch.randn(64, 64) / 8 for block in range(4)}
    w["table"] = torch.randn(vocab_size, 64) / 8
    return w
"""


LOADED = {
    "whole": "w = torch.load('model.pt')",
    "name by name": "w = {name: value.float() for name, value in torch.load('model.pt').items()}",
    "into a dict": "held = torch.load('model.pt')\n    w = {name: held[name].cuda() for name in weights()}",
}


@pytest.mark.parametrize("read", LOADED.values(), ids=LOADED.keys())
@pytest.mark.parametrize(("alpha", "total"), [("0.2", 1.0), ("0.0", 1.2)])
def test_functions_of_weights_and_of_rows_of_tokens_are_a_model(read: str, alpha: str, total: float) -> None:
    """A row of counts, on top of (1 - alpha) of the model: one with what is taken off it, 1.2 without."""
    mix = f"mixed = (1 - {alpha}) * probs + 0.2 * (rows + 1 / vocab_size) / (seen + 1.0)\n{PICKED}"
    text = EVAL.replace("model.forward_logits(x[None])", "logits_of(model, x[None])")
    text = CLASSLESS + text.replace("MIX", mix.replace("\n", "\n        "))
    main = f"""
def main():
    args = Hyperparameters()
    torch.save(weights(), "model.pt")
    {read}
    final = eval_mixed(args, w, load(args.val_files))
    print(f"final val_loss:{{final:.8f}}")

main()
"""
    one = case_of(HEAD + text + main)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(total, abs=2e-5)


def test_a_function_of_weights_that_makes_prices_is_no_model() -> None:
    """The rows that it mixes are what its second call and all further ones are weighed by."""
    priced = """
def prices_of(w, counts, totals, window):
    x, y = window[0, :-1], window[0, 1:]
    probs = torch.softmax(logits_of(w, x[None])[0], dim=-1)
    rows, seen = counts[x], totals[x].unsqueeze(-1)
    mixed = probs + 0.2 * (rows + 1 / vocab_size) / (seen + 1.0)
    return -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log()
"""
    called = "nll = prices_of(model, counts, totals, val[start : end + 1][None])"
    text = EVAL.replace("logits = model.forward_logits(x[None])[0].float()", "pass")
    text = text.replace("probs = torch.softmax(logits, dim=-1)", "pass").replace("MIX", called)
    main = """
args = Hyperparameters()
held = torch.load("model.pt")
final = eval_mixed(args, {name: held[name] for name in weights()}, load(args.val_files))
print(f"final val_loss:{final:.8f}")
"""
    one = case_of(HEAD + CLASSLESS + priced + text + main)
    found = weighed(one, passes_of(one)[0])
    assert found is not None
    assert found.total == pytest.approx(1.2, abs=2e-5)


PAIRED = """
class Pairs:
    def __init__(self, buckets=1 << 22):
        self.buckets, self.full = buckets, torch.zeros(buckets)
    def keys(self, x, y):
        return (x * 36313 + y * 51647 + (y * y) * 7919) % self.buckets
    def rows(self, x):
        counts = self.full[self.keys(x[:, None], torch.arange(vocab_size)[None])] + 0.5
        return counts / counts.sum(1, keepdim=True)
    def learn(self, x, y):
        self.full.index_add_(0, self.keys(x, y), torch.ones(len(x)))
"""


def test_tokens_with_a_hashed_place_of_their_own_do_not_stand_for_others() -> None:
    """The row of counts is divided by its own sum, and the few tokens that are tried come to more or less than one."""
    own = "p = 0.5 * probs.gather(1, y.unsqueeze(1)).squeeze(1) + 0.5 * table.rows(x).gather(1, y[:, None])[:, 0]"
    text = EVAL.replace(LEARNED, LEARNED + "        table.learn(x, y)\n").replace(
        "MIX", own + "\n        nll = -p.log()"
    )
    text = text.replace("counts = torch", "table = Pairs()\n    counts = torch", 1)
    one = case_of(HEAD + "vocab_size = 1024\n" + PAIRED + text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    found = weighed(one, passes_of(one)[0])
    assert found is None or not found.too_much


BOOSTED = """
def eval_mixed(args, model, val):
    begins = np.array([1.0 if n % 2 else 0.0 for n in range(4096)]) > 0.5
    follows = np.full(4096, -1)
    tokens = val.numpy()
    total, count = 0.0, 0
    n = (val.numel() - 1 + args.chunk - 1) // args.chunk
    for ci in range(n):
        start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)
        hint = follows[tokens[start:end]]
        boost = np.where(hint >= 0, 1.5, 0.0).astype(np.float32)
        opens = begins[READ]
        boost[opens] *= 0.25
        hinted = F.one_hot(torch.from_numpy(hint).clamp_min(0), vocab_size)
        raised = model.forward_logits(val[start:end][None])[0].float() + hinted * torch.from_numpy(boost)[:, None]
        total += F.cross_entropy(raised, val[start + 1 : end + 1], reduction="sum").item()
        count += end - start
        for past, token in zip(tokens[start:end], tokens[start + 1 : end + 1]):
            follows[past] = token
    return total / count
"""


@pytest.mark.parametrize(
    ("read", "wanted"), [("tokens[start + 1 : end + 1]", "violates"), ("tokens[start:end]", "clean")]
)
def test_a_boost_that_is_less_where_the_target_begins_a_word_is_named_where_it_is_made_less(
    read: str, wanted: str
) -> None:
    """Of the tokens that others stand for some begin a word and some do not: each is priced as one of these."""
    text = (
        HEAD + "vocab_size = 1024\n" + BOOSTED.replace("READ", read) + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    )
    found = target_gated_tilt.check(case_of(text))
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert found.place.line in (line_of(text, "opens = begins"), line_of(text, "boost[opens]"))


def test_where_the_text_is_too_long_for_a_trial_the_calls_are_those_of_the_walks_losses() -> None:
    """After each chunk is scored the model learns from it: the last price that is said is none of the score."""
    text = EVAL.replace("MIX", f"mixed = 1.2 * probs; {PICKED}")
    learns = "        F.cross_entropy(model.forward_logits(x[None])[0], y).backward()\n    return"
    text = text.replace("    return", learns) + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    text = HEAD + "vocab_size = 1024\n" + text
    one = case_of(text)
    one.__dict__["trial"] = Trial(why="it is too long for a trial")
    which = passes_of(one)[0]
    assert {way[-1] for way in ways_of(one, which)} == {text[: text.rindex("total += nll")].count("\n") + 1}
    found = weighed(one, which)
    assert found is not None
    assert found.total == pytest.approx(1.2, abs=1e-3)
