"""Writes to many tensors at once, rows that are unpacked, masks that only count, and what goes into the file."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.flow.values import MASK, Tok, Value, join
from tests.audit.order import HEAD, HONEST, MAIN, broken, doubted, trace_of

EVAL = "    final = eval_ttt(args, model, val)\n"


def with_main(body: str, head: str = HEAD) -> str:
    return head + MAIN.replace(EVAL, body)


WALK = (
    "    ps = list(model.parameters())\n    total = count = 0\n    for s in range(0, val.numel() - 1024, 1024):\n"
    "        x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]\n        FIRST\n"
    "        total += model(x, y).item() * 1024\n        count += 1024\n        THEN\n    final = total / count\n"
)
AT_ONCE = "torch._foreach_add_(ps, torch.autograd.grad(model(x, y), ps), alpha=-0.01)"


def test_weights_that_are_written_all_at_once_learn() -> None:
    first, then = (
        with_main(WALK.replace("FIRST", a).replace("THEN", b)) for a, b in ((AT_ONCE, "pass"), ("pass", AT_ONCE))
    )
    assert "training-before-scoring" in broken(first)
    assert doubted(then) == set()


def test_lists_that_hold_no_weights_teach_nobody() -> None:
    text = WALK.replace("FIRST", "sums = [torch.zeros(1)]; torch._foreach_add_(sums, [model(x, y)])")
    assert doubted(with_main(text.replace("THEN", "pass"))) == set()


ROWS = (
    "    nats, seen, spare = torch.zeros(3, dtype=torch.float64)\n    for s in range(0, val.numel() - 1024, 1024):\n"
    "        nats += model(val[s : s + 1024][None], val[s + 1 : s + 1025][None]).detach() * 1024\n        seen += 1024\n"
    "    print(f'seen {SAID.item()}')\n    final = (nats / seen).item()\n"
)


def test_what_is_added_to_one_row_is_not_in_the_others() -> None:
    def last(said: str) -> list[str]:
        return [each.text for each in trace_of(with_main(ROWS.replace("SAID", said))).said if "seen" in each.text]

    assert last("seen") == []
    assert last("spare") == []
    assert last("nats") != []
    assert doubted(with_main(ROWS.replace("SAID", "seen"))) == set()


MASKED = (
    "    total = count = 0\n    for s in range(0, val.numel() - 1024, 64):\n"
    "        x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]\n        h = model.hidden(x).detach()\n"
    "        early = torch.zeros(1024)\n        early[: 1024 - 64] = 1\n"
    "        delta = torch.zeros(1, 1, 64, requires_grad=True)\n        opt = torch.optim.AdamW([delta], lr=0.01)\n"
    "        for _ in range(8):\n            nll = F.cross_entropy(model.head(h + delta)[0], y[0], reduction='none')\n"
    "            opt.zero_grad()\n            (LOSS.sum() / early.sum()).backward()\n            opt.step()\n"
    "        nll = F.cross_entropy(model.head(h + delta)[0], y[0], reduction='none')\n"
    "        total += nll[1024 - 64 :].sum().item()\n        count += 64\n    final = total / count\n"
)


def test_dividing_by_how_many_a_mask_holds_picks_none_of_them() -> None:
    assert "slot-on-scored" in broken(with_main(MASKED.replace("LOSS", "nll")))
    assert broken(with_main(MASKED.replace("LOSS", "(nll * early)"))) == set()


FILED = (
    "    opt = torch.optim.SGD(model.parameters(), lr=0.1)\n    TAUGHT\n    torch.save(model.state_dict(), 'model.pt')\n"
    "    fresh = GPT().cuda()\n    fresh.load_state_dict(torch.load('model.pt'))\n    final = eval_ttt(args, fresh, val)\n"
)
TEACH = (
    "for text in (DATA,):\n        for i in range(0, text.numel() - 1024, 1024):\n"
    "            model(text[i : i + 1024][None], text[i + 1 : i + 1025][None]).backward()\n"
    "            opt.step()\n            opt.zero_grad()\n"
)


def test_validation_tokens_learnt_before_the_file_is_written_are_in_training() -> None:
    learnt = broken(with_main(FILED.replace("TAUGHT", TEACH.replace("DATA", "val"))))
    assert "validation-in-training" in learnt
    assert "rescoring-after-adaptation" not in learnt
    train = TEACH.replace("DATA", "load(args.train_files)")
    assert "validation-in-training" not in broken(with_main(FILED.replace("TAUGHT", train)))


def test_adaptation_of_what_the_file_holds_is_none() -> None:
    assert doubted(with_main(FILED.replace("TAUGHT", "pass"))) == set()
    assert doubted(HONEST) == set()


FILLED = """
def counted(args, model, val):
    counts = torch.zeros(2, 1024, 1024)
    total, count = 0.0, 0
    for start in range(0, val.numel() - 1024, 1024):
        x, y = val[start : start + 1024], val[start + 1 : start + 1025]
        with torch.no_grad():
            p = torch.softmax(model.forward_logits(x[None])[0], -1)
        STEPS
    return total / count
"""
FILL = {
    "by its place": ("counts[0].index_put_((x, y), torch.ones(1024), accumulate=True)",),
    "by a name": ("part = counts[0]", "part.index_put_((x, y), torch.ones(1024), accumulate=True)"),
}
PRICED = (
    "rows = counts[0][x] + 0.1",
    "mixed = 0.9 * p + 0.1 * rows / rows.sum(-1, keepdim=True)",
    "total += -torch.log(mixed.gather(1, y[:, None])).sum().item()",
    "count += 1024",
)


@pytest.mark.parametrize("way", FILL)
def test_a_part_of_a_table_that_is_filled_is_the_tables(way: str) -> None:
    def script(*steps: str) -> str:
        walk = FILLED.replace("STEPS", ("\n" + " " * 8).join(steps))
        return HEAD + walk + MAIN.replace("eval_ttt(args, model, val)", "counted(args, model, val)")

    assert broken(script(*PRICED, *FILL[way])) == set()
    assert broken(script(*FILL[way], *PRICED)) & {"two-pass-cache", "training-before-scoring"}


def test_a_mask_of_places_beside_one_of_tokens_leaves_it_a_mask() -> None:
    """`whole = places >= 2`, and then `whole &= tokens != 1` in some turns: what it picks are places, and no entries of
    a table."""
    tokens = frozenset((Tok("val"),))
    mask = Value(toks=tokens, flags=MASK)
    assert join(mask, Value()).flags & MASK
    assert not join(mask, Value(toks=tokens)).flags & MASK


FITTED = """
import lzma
from pathlib import Path

ARTIFACT = Path("model.xz")

def share_of(model, tokens):
    x, y = tokens[:4096].view(-1, 1024), tokens[1:4097].view(-1, 1024)
    with torch.no_grad():
        logits = model.forward_logits(x)
    losses = [F.cross_entropy(share * logits.view(-1, 1024), y.reshape(-1)).item() for share in (0.8, 0.9, 1.0)]
    return sum(share / loss for share, loss in zip((0.8, 0.9, 1.0), losses)) / sum(1 / loss for loss in losses)

def pack(model, share, prior):
    buffer = io.BytesIO()
    record = {"plain": {k: v.half().cpu() for k, v in model.state_dict().items()}, "share": share, "prior": prior}
    torch.save(record, buffer)
    ARTIFACT.write_bytes(lzma.compress(buffer.getvalue()))

def unpack():
    record = torch.load(io.BytesIO(lzma.decompress(ARTIFACT.read_bytes())))
    model = GPT()
    model.load_state_dict({k: v.float() for k, v in record["plain"].items()})
    return model, float(record["share"]), record["prior"].float()

class Bias:
    def __init__(self, prior):
        self.prior, self.counts = prior, torch.zeros_like(prior)
    def vector(self):
        posterior = (self.counts + 2.0 * self.prior.exp()) / (self.counts.sum() + 2.0)
        return posterior.log() - self.prior
    def learn(self, tokens):
        self.counts += torch.bincount(tokens, minlength=1024)

def eval_rounds(args, model, share, prior, val, rounds):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(rounds):
        total, count, bias = torch.zeros((), dtype=torch.float64), 0, Bias(prior)
        for s in range(0, val.numel() - 1024, 1024):
            x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]
            main = model.forward_logits(x) + bias.vector()
            side = model.forward_logits(x) * 0.9 + bias.vector()
            log_probs = torch.logaddexp(
                F.log_softmax(main, dim=-1) + math.log(share), F.log_softmax(side, dim=-1) + math.log1p(-share)
            )
            loss = -log_probs.gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()
            bias.learn(y.reshape(-1))
            total += loss.detach().double() * 1024
            count += 1024
            loss.backward()
            opt.step()
            opt.zero_grad()
    return (total / count).item()
"""


@pytest.mark.parametrize(("rounds", "wanted"), [(1, set()), (2, {"multi-epoch-last"})])
def test_an_artifact_that_holds_a_fitted_number_beside_weights_is_no_table_of_losses(
    rounds: int, wanted: set[str]
) -> None:
    """What is read back is the model, and its prior is no text: steps on it are steps on the validation tokens."""
    body = (
        "    tokens = load(args.train_files)\n"
        "    prior = torch.bincount(tokens, minlength=1024).float().add(1).log()\n"
        "    pack(model, share_of(model, tokens), prior - prior.logsumexp(0))\n"
        "    model, share, prior = unpack()\n"
        f"    final = eval_rounds(args, model, share, prior, val, {rounds})\n"
    )
    text = HEAD + FITTED + MAIN.replace("    final = eval_ttt(args, model, val)\n", body)
    assert broken(text) == wanted
    trace = trace_of(text)
    assert trace.saved, "the artifact is a file of weights"
    assert not [said for said in trace.said if said.how == "written"], "and no number that is told"
    last = text[: text.rindex("            loss.backward()")].count("\n")
    inside = [score for score in trace.scores if last - 12 < score.place.line <= last]
    assert {tok.data for score in inside for tok in score.targets} == {"val"}
