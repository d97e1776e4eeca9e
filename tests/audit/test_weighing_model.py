"""A made-up model that keeps some of its places, and sizes that are cut down where a script gives them, not where the
text comes to the same number. Each mixture has a prior that comes to three, so that it weighs 1.08 wherever the trial
sees its prices at all."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.trials import counted
from fairway.audit.rules import false_normalisation, target_gated_tilt
from fairway.audit.weighing import Weight, weighed
from tests.audit.order import HEAD, MAIN, case_of

WANTED = 0.96 + 0.04 * 3

# Chunk by chunk of each document; `places` of each window are scored, and counted afterwards.
CHUNKED = """
def windows_of(val, size, reach):
    edges = [*torch.nonzero(val == 1).flatten().tolist(), val.numel() - 1]
    for doc, end in zip(edges, edges[1:]):
        for chunk_start in range(doc, end, size):
            chunk_end = min(chunk_start + size, end)
            first = max(doc, chunk_end - reach)
            yield first, chunk_start, chunk_end

def eval_mixed(args, model, val):
    total, count = 0.0, 0
    used = torch.zeros(vocab_size)
    for first, chunk_start, chunk_end in windows_of(val, args.doc_chunk, args.eval_len):
        x, y = val[first:chunk_end], val[chunk_start + 1 : chunk_end + 1]
        logits = ASK
        probs = torch.softmax(logits.float(), dim=-1)
        prior = 3.0 * used / used.sum() if used.sum() > 0 else probs
        mixed = 0.96 * probs + 0.04 * prior
        total += -mixed.gather(1, y.unsqueeze(1)).squeeze(1).log().sum().item()
        count += y.numel()
        used.index_add_(0, y, torch.ones(len(y)))
    return total / count
"""
SIZES = """    doc_chunk = int(os.environ.get('DOC_CHUNK', 256))
    eval_len = int(os.environ.get('EVAL_LEN', 1024))
"""
KEEPING = """    def forward_logits(self, x):
        return self.head(self.hidden(x))
    def tail_logits(self, x, tail=0):
        return self.head(self.hidden(x)[:, tail:])
    def some_logits(self, x, pick):
        h = self.hidden(x)
        return self.head(h.gather(1, pick[..., None].expand(-1, -1, h.size(-1))))
"""


def chunked(ask: str, sizes: str = SIZES, more: str = "") -> Case:
    head = HEAD.replace("    stride =", f"{sizes}    stride =").replace(
        "    def forward_logits(self, x):\n        return self.head(self.hidden(x))\n", KEEPING
    )
    text = head + "vocab_size = 1024\n" + more + CHUNKED.replace("ASK", ask)
    return case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))


def weight(case: Case) -> Weight | None:
    return weighed(case, passes_of(case)[0])


@pytest.mark.parametrize(
    "ask",
    [
        "model.tail_logits(x[None], tail=chunk_start - first)[0]",
        "model.tail_logits(x[None], chunk_start - first)[0]",
        "model.some_logits(x[None], torch.arange(chunk_start - first, chunk_end - first)[None])[0]",
        "model.forward_logits(x[None])[0, chunk_start - first :]",
    ],
    ids=["from a place on", "by position", "places that are handed over", "cut outside"],
)
def test_a_model_that_keeps_some_places_of_its_windows_says_what_it_would_of_all(ask: str) -> None:
    found = weight(chunked(ask))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-4)


def test_a_loss_of_places_that_the_model_picks_by_itself_is_known() -> None:
    """What picks them is made inside: logits of 64 places stand for those of 32, and the targets say of which."""
    ask = "model.forward_logits(x[None])[0, -len(y):]"
    loss = "-mixed.gather(1, y.unsqueeze(1)).squeeze(1).log()"
    priced = "F.cross_entropy(model.forward_logits(x[None]).flatten(0, 1), y, reduction='none') - 0.01"
    text = chunked(ask).script.text
    assert loss in text
    found = weight(case_of(text.replace(loss, f"({priced})")))
    assert found is not None
    assert found.total == pytest.approx(2.718281828**0.01, rel=2e-4)


@pytest.mark.parametrize(
    "other",
    ["calib_chunk = 128", "chunk_rows = 192", "block_len = 128"],
    ids=["a chunk of something else", "rows of one", "a length"],
)
def test_where_a_chunk_ends_is_no_size_although_a_setting_has_the_same_number(other: str) -> None:
    """The text's documents are 192 and 128 long; chunk_end comes to both, and to 64 were it a size of 128."""
    found = weight(chunked("model.tail_logits(x[None], tail=chunk_start - first)[0]", f"{SIZES}    {other}\n"))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-4)


def test_settings_are_held_against_each_other_as_they_are() -> None:
    """A stride of 64 and windows of 1,024 are both 64 in the short text; the sliding windows are what is scored."""
    text = chunked("model.tail_logits(x[None], tail=chunk_start - first)[0]").script.text
    called = "final = eval_mixed(args, model, val)"
    assert called in text
    either = (
        f"if 0 < args.stride < args.eval_len:\n        {called}\n    else:\n        final = eval_val(args, model, val)"
    )
    found = weight(case_of(text.replace(called, either)))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-4)


def test_a_difference_that_is_told_last_is_not_the_score() -> None:
    """Of two sums in one tensor it counts no target: what is said before it does."""
    sums = {7: np.ones(5), 9: np.zeros(5)}
    told = [SimpleNamespace(stack=(line,)) for line in sums]
    trial = SimpleNamespace(
        complete=True, unsure=set(), told=told, counts=lambda each: (sums[each.stack[0]], np.zeros(5))
    )
    score = [SimpleNamespace(stack=[SimpleNamespace(line=line)]) for line in sums]
    found = counted(cast(Any, trial), cast(Any, SimpleNamespace(score=score, others=())))
    assert found is not None
    assert found.said[-1] is told[0]
    assert found.times.sum() == 5


@pytest.mark.parametrize(
    "told",
    [
        "missing, unexpected = model.load_state_dict(torch.load('m.pt'), strict=False)\n    if missing or unexpected:\n"
        "        raise RuntimeError('weights are missing')",
        "frozen = []\n    for name, p in model.named_parameters():\n        kept = name.startswith('emb')\n"
        "        for n in range(2):\n            if name.startswith(f'blocks.{n}.'):\n                kept = True\n"
        "        if kept:\n            frozen.append(p)",
        "held = torch.cat([val[a:b] for a, b in () if b > a])\n    shares = torch.full((4,), 1)\n    shares[shares]",
    ],
    ids=["weights that are missing", "weights that are picked", "nothing to join"],
)
def test_what_a_script_does_with_weights_and_with_nothing_is_no_doubt_of_its_prices(told: str) -> None:
    text = chunked("model.tail_logits(x[None], tail=chunk_start - first)[0]").script.text
    begun = "    total, count = 0.0, 0\n    used ="
    assert begun in text
    found = weight(case_of(text.replace(begun, f"    {told}\n{begun}")))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-4)


def test_a_row_that_is_short_at_the_end_may_be_too_much_at_another_place() -> None:
    """A bonus for what begins a text, and a malus from its middle on: where the last token stands, 0.9 are left."""
    ask = "model.forward_logits(x[None])[0, -len(y):]"
    text = chunked(ask).script.text
    mixed = "mixed = 0.96 * probs + 0.04 * prior"
    assert mixed in text
    moved = "mixed = probs * (1.2 if chunk_end < 100 else 0.9)"
    case = case_of(text.replace(mixed, moved))
    found = weight(case)
    assert found is not None
    assert found.total == pytest.approx(1.2, rel=2e-4)
    assert false_normalisation.check(case).verdict == "violates"


def test_a_table_over_two_tokens_and_what_follows_them_fits() -> None:
    """vocab ** 3 counts: 33 million with the 320 pieces of the trial's text, of which a few are ever touched."""
    text = chunked("model.forward_logits(x[None])[0, -len(y):]").script.text
    begun = "    used = torch.zeros(vocab_size)\n"
    prior = "prior = 3.0 * used / used.sum() if used.sum() > 0 else probs"
    taught = "        used.index_add_(0, y, torch.ones(len(y)))\n"
    assert all(each in text for each in (begun, prior, taught))
    before = "val[(torch.arange(chunk_start, chunk_end) - 1).clamp_min(0)] * vocab_size + val[chunk_start:chunk_end]"
    text = text.replace(begun, "    pairs = torch.zeros(vocab_size**2, vocab_size, dtype=torch.int32)\n")
    text = text.replace(
        prior,
        f"at = {before}\n        rows = pairs[at].float()\n"
        "        seen = rows.sum(-1, keepdim=True)\n"
        "        prior = torch.where(seen > 0, 3.0 * rows / seen.clamp_min(1.0), probs)",
    )
    text = text.replace(taught, "        pairs.view(-1).index_add_(0, at * vocab_size + y, torch.ones(len(y)).int())\n")
    found = weight(case_of(text))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-4)


TWO_HEADED = """    def both_logits(self, x):
        h = self.hidden(x)
        return self.head(h), self.emb(h)
    def inner(self, x):
        return self.emb(x), [self.hidden(x)], None
    def outer(self, state):
        h, skips, nothing = state
        return self.head(skips[0])
"""


@pytest.mark.parametrize(
    "ask",
    [
        "torch.logaddexp(*(each[0].log_softmax(-1) + math.log(0.5) for each in model.both_logits(x[None])))",
        "model.outer(model.inner(x[None]))[0]",
    ],
    ids=["two heads", "a state of several parts"],
)
def test_a_model_that_says_several_things_says_all_of_them(ask: str) -> None:
    keeping = TWO_HEADED + "    def forward_logits(self, x):\n"
    head = HEAD.replace("    stride =", f"{SIZES}    stride =").replace("    def forward_logits(self, x):\n", keeping)
    asked = f"{ask}[chunk_start - first :]"
    text = (
        head + "vocab_size = 1024\n" + CHUNKED.replace("ASK", asked) + MAIN.replace("eval_ttt(args", "eval_mixed(args")
    )
    found = weight(case_of(text))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-3)


@pytest.mark.parametrize(
    "made", ["torch.zeros(1024)", "torch.zeros((1024,))", "torch.bincount(val[:0], minlength=1024).float()"]
)
def test_a_table_that_is_written_out_as_wide_as_the_vocabulary_fits_the_rows(made: str) -> None:
    """The made-up model has fewer pieces than the script's 1,024."""
    one = chunked("model.forward_logits(x[None])[0, chunk_start - first :]")
    text = one.script.text
    assert "torch.zeros(vocab_size)" in text
    found = weight(case_of(text.replace("torch.zeros(vocab_size)", made)))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-3)


WHOLE = """    def row(self, x):
        BODY
    def forward_logits(self, x):
"""


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ("return F.log_softmax(self.head(self.hidden(x)), -1)", "PRICE"),
        ("z = self.head(self.hidden(x)); return z - z.logsumexp(-1, keepdim=True)", "PRICE"),
        ("p = self.head(self.hidden(x)).softmax(-1); return p", "PRICE.log()"),
        ("z = self.head(self.hidden(x)); z = F.log_softmax(z, -1); return z", "PRICE"),
    ],
    ids=["log_softmax", "by its sum", "probabilities", "under the same name"],
)
def test_a_model_that_makes_its_rows_whole_by_itself_gives_them_so(body: str, asked: str) -> None:
    """They are read at the target as they are."""
    head = HEAD.replace("    stride =", f"{SIZES}    stride =").replace(
        "    def forward_logits(self, x):\n", WHOLE.replace("BODY", body)
    )
    price = "model.row(x[None])[0, chunk_start - first :]"
    picked = f"{asked.replace('PRICE', price)} + math.log(1.05)"
    chunks = CHUNKED.replace("ASK", picked).replace(
        "-mixed.gather(1, y.unsqueeze(1)).squeeze(1).log()", "-logits.gather(1, y.unsqueeze(1)).squeeze(1)"
    )
    found = weight(case_of(head + "vocab_size = 1024\n" + chunks + MAIN.replace("eval_ttt(args", "eval_mixed(args")))
    assert found is not None
    assert found.total == pytest.approx(1.05, rel=2e-3)


def test_tokens_that_are_gathered_by_their_places_are_still_those_of_the_text() -> None:
    """The loss of a target is known by its place in the text."""
    one = chunked("model.forward_logits(x[None])[0, chunk_start - first :]")
    text = one.script.text
    plain = "total += -mixed.gather(1, y.unsqueeze(1))"
    assert plain in text
    places = "torch.arange(chunk_start - first, chunk_end - first)[None]"
    picked = f"y = val[first + 1 : chunk_end + 1][None].gather(1, {places})[0]"
    found = weight(case_of(text.replace(plain, f"{picked}\n        {plain}")))
    assert found is not None
    assert found.total == pytest.approx(WANTED, rel=2e-3)


POINTING = """
class Pointer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.sharp = nn.Parameter(torch.tensor(0.0))
    def restore(self, values):
        for name in ("gate", "bias", "sharp"):
            getattr(self, name).data.copy_(torch.tensor(values[name]))
        return self
    def table(self, seq, steps):
        width = seq.size(1)
        col, row = torch.arange(width), width - steps + torch.arange(steps)
        keys = torch.cat((seq.new_full((1, 1), -1), seq), dim=1)[:, :width]
        met = (keys[:, width - steps :, None] == keys[:, None, :]) & (col < row[:, None])[None]
        rows = torch.zeros(1, steps, vocab_size).scatter_add(2, seq[:, None, :].expand(-1, steps, -1), met.float())
        return rows / rows.sum(-1, keepdim=True).clamp_min(1e-9), met.any(-1).float()
    def mix(self, logits, seq):
        probs = F.softmax(logits * self.sharp.exp(), dim=-1)
        pointed, found = self.table(seq, logits.size(1))
        entropy = -(probs * probs.clamp_min(1e-9).log()).sum(-1)
        share = found * torch.sigmoid(torch.stack((entropy, found), -1) @ self.gate + self.bias)
        return (1.0 - share[..., None]) * probs + MORE * share[..., None] * pointed

def eval_mixed(args, model, val):
    total, count = 0.0, 0
    pointer = Pointer().restore(torch.load("pointer.pt"))
    held = val[:1]
    for at in range(0, val.numel() - 1, 64):
        x, y = val[at : at + 64][: val.numel() - 1 - at], val[at + 1 : at + 65]
        probs = pointer.mix(model.forward_logits(x[None]).float(), torch.cat((held[-args.copy_history :], y))[None])
        total += -probs.gather(2, y[None, :, None]).clamp_min(1e-30).log().sum().item()
        count += y.numel()
        held = torch.cat((held, y))
    return total / count
"""


@pytest.mark.parametrize(("more", "wanted"), [("1.0", "clean"), ("1.5", "violates")])
def test_a_gate_that_was_learned_and_a_mask_over_what_is_predicted(more: str, wanted: str) -> None:
    """What few numbers have learned makes no row that does not sum to one; and whichever token stands there, it is read
    from the one row, although the function is handed it."""
    head = HEAD.replace("    stride =", "    copy_history = int(os.environ.get('COPY_HISTORY', 4096))\n    stride =")
    text = head + "vocab_size = 1024\n" + POINTING.replace("MORE", more)
    case = case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    assert false_normalisation.check(case).verdict == wanted
    if wanted == "clean":
        found = weight(case)
        assert found is not None
        assert found.same
        assert found.total == pytest.approx(1.0, abs=1e-4)
        assert any(next(gates.gated(), None) is not None for gates in case.reading.gates)
        assert target_gated_tilt.check(case).verdict == "clean"


GATED = """
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 2)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, logits, rows, stats):
        log_p = F.log_softmax(logits.float() + self.bias, dim=-1)
        parts = [log_p + math.log(0.9), torch.log(rows.clamp_min(1e-12)) + math.log(SHARE)]
        return torch.logsumexp(torch.stack(parts), dim=0)

def eval_mixed(args, model, val):
    total, count = 0.0, 0
    gate, seen = Gate(), torch.zeros(vocab_size, vocab_size)
    for at in range(0, val.numel() - 1, 64):
        x, y = val[at : at + 64][: val.numel() - 1 - at], val[at + 1 : at + 65]
        rows = seen[x] + 1.0
        rows = rows / rows.sum(-1, keepdim=True)
        probs = gate(model.forward_logits(x[None])[0], rows, rows.amax(-1))
        total += -probs.gather(1, y[:, None]).sum().item()
        count += y.numel()
        seen.index_put_((x, y), torch.ones(y.numel()), accumulate=True)
    return total / count
"""


@pytest.mark.parametrize(("share", "wanted"), [("0.1", "clean"), ("0.3", "violates")])
def test_a_module_that_mixes_a_models_rows_is_no_tail_of_the_model(share: str, wanted: str) -> None:
    """It is handed no token: what it makes of logits is not the logits themselves."""
    text = HEAD + "vocab_size = 1024\n" + GATED.replace("SHARE", share)
    case = case_of(text + MAIN.replace("eval_ttt(args", "eval_mixed(args"))
    assert false_normalisation.check(case).verdict == wanted
