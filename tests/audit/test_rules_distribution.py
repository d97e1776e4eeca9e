"""Distributions: a loss reads its target as a place in a finished distribution, and in no other way."""

from pathlib import Path

import pytest

from tests.audit.small import TABLE, line_of, script, verdict, verdicts

RULES = ("oracle_gate", "gold_token_ngram", "false_normalisation", "target_gated_tilt", "byte_mixture")

PLAIN = """
        logits = net(torch.from_numpy(x))
        nll = F.cross_entropy(logits.float(), torch.from_numpy(y), reduction="none")
"""

# ---- honest ways, which no rule may accuse

CACHE = """
class Rows:
    def __init__(self):
        self.counts = torch.ones(V, V)

    def of(self, previous):
        rows = self.counts[previous]
        return rows / rows.sum(-1, keepdim=True)

    def learn(self, previous, following):
        self.counts.index_put_((previous, following), torch.ones(len(previous)), accumulate=True)
"""

BLEND = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p = 0.9 * torch.softmax(net(a).float(), -1) + 0.1 * rows.of(a)
        nll = -p.gather(-1, b[:, None])[:, 0].log()
        rows.learn(a, b)
"""

TILT = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        log_p = torch.log_softmax(net(a).float(), -1)
        keys = [tuple(x[max(0, j - 5) : j + 1].tolist()) for j in range(len(x))]
        hint = torch.tensor([memory.get(key, -1) for key in keys])
        beta = torch.where(hint >= 0, 2.0, 0.0)
        p_hint = log_p.gather(-1, hint.clamp_min(0)[:, None])[:, 0].exp()
        nll = -log_p.gather(-1, b[:, None])[:, 0] + torch.log1p(p_hint * (beta.exp() - 1)) - beta * (hint == b)
        for key, token in zip(keys, y.tolist()):
            memory[key] = token
"""

EXACT = """
        for j in range(1, len(y)):
            row = memory.setdefault((int(x[j - 1]), int(x[j])), {})
            total = sum(row.values())
            p = float(torch.softmax(net(torch.from_numpy(x[: j + 1]))[-1], -1)[int(y[j])])
            weight = total / (total + 4.0)
            mixed = (1 - weight) * p + (weight * row.get(int(y[j]), 0) / total if total else 0.0)
            nll = torch.tensor([-math.log(mixed)])
            row[int(y[j])] = row.get(int(y[j]), 0) + 1
"""

UNSURE = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        p, q = torch.softmax(net(a).float(), -1), torch.softmax(net(a).float() / 2, -1)
        doubt = -(p * p.log()).sum(-1, keepdim=True)
        nll = -torch.where(doubt > 2.0, p, q).gather(-1, b[:, None])[:, 0].log()
"""

PADDED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        losses = F.cross_entropy(net(a).float(), b, reduction="none")
        nll = torch.where(b != 0, losses, torch.zeros_like(losses)).clamp(max=80.0)
"""

EXPERTS = """
class Mixer:
    def __init__(self):
        self.counts, self.weights = np.zeros((1 << 16, V)), np.zeros((1, 2))

    def state(self):
        return self.counts, self.weights, 0.02

def mix(before, after, log_p, counts, weights, rate, out):
    for j in range(len(after)):
        row = (before[j] * 36313) & 65535
        top = weights[0, 0]
        for e in range(1, 2):
            top = max(top, weights[0, e])
        share, total = np.empty(2), 0.0
        for e in range(2):
            share[e] = math.exp(weights[0, e] - top)
            total += share[e]
        chance = np.empty((2, V))
        for a in range(V):
            chance[0, a] = math.exp(log_p[j, a])
            chance[1, a] = (counts[row, a] + 0.1) / (counts[row].sum() + 0.1 * V)
        pool = (share[0] * chance[0] + share[1] * chance[1]) / total
        token = after[j]
        out[j] = -math.log(max(pool[token], 1e-12))
        for e in range(2):
            weights[0, e] += rate * (chance[e, token] / pool[token] - 1.0)
        counts[row, token] += 1
        if counts[row, token] > 255:
            counts[row] = counts[row] // 2
"""

LEARNING = """
        out = np.empty(len(y))
        log_p = torch.log_softmax(net(torch.from_numpy(x)).float(), -1).numpy()
        mix(x, y, log_p, *mixer.state(), out)
        nll = torch.from_numpy(out)
"""

HONEST = {
    "experts-that-learn-token-by-token": (LEARNING, "mixer = Mixer()", EXPERTS),
    "plain": (PLAIN, "pass", ""),
    "blended-rows": (BLEND, "rows = Rows()", CACHE),
    "token-only-tilt": (TILT, "memory = {}", ""),
    "exact-counts": (EXACT, "memory = {}", ""),
    "gate-by-entropy": (UNSURE, "pass", ""),
    "padding-left-out": (PADDED, "pass", ""),
}


@pytest.mark.parametrize("way", HONEST)
def test_an_honest_way_is_clean(tmp_path: Path, way: str) -> None:
    loss, state, extra = HONEST[way]
    for finding in verdicts(tmp_path, RULES, script(loss=loss, state=state, extra=extra)).values():
        assert finding.verdict == "clean", finding.evidence


# ---- oracle gates

GATED = BLEND.replace(
    "nll = -p", "own = F.cross_entropy(net(a).float(), b, reduction='none')\n        mixed = -p"
).replace("        rows.learn", "        {choice}\n        rows.learn")


@pytest.mark.parametrize(
    "choice",
    [
        "nll = torch.where(mixed < own, mixed, own)",
        "nll = torch.minimum(mixed, own)",
        "nll = torch.stack([mixed, own]).min(0).values",
        "nll = own if own.sum() < mixed.sum() else mixed",
        "gain = own - mixed\n        nll = torch.where(gain > 0, mixed, own)",
        "nll = honest_helper(own, mixed)",
        "nll = own\n        better = mixed < nll\n        nll[better] = mixed[better]",
        "nll = own\n        in_place(nll, mixed)",
        "better = p.gather(1, b[:, None]) > torch.softmax(net(a).float(), -1).gather(1, b[:, None])\n"
        "        both = torch.softmax(net(a).float(), -1) * (1 - 0.1 * better.float()) + 0.1 * better.float() * p\n"
        "        nll = -both.gather(1, b[:, None])[:, 0].log()",
    ],
    ids=[
        "where",
        "minimum",
        "stacked",
        "by-sums",
        "by-a-difference",
        "helper",
        "stored",
        "helper-stores",
        "a-mask-of-the-weight",
    ],
)
def test_the_better_of_two_predictions_is_an_oracle(tmp_path: Path, choice: str) -> None:
    helper = (
        CACHE
        + "\n\ndef honest_helper(first, second):\n    keep = first.le(second)\n"
        + "    return torch.where(keep, first, second)\n"
        + "\n\ndef in_place(first, second):\n    better = second < first\n    first[better] = second[better]\n"
    )
    text = script(loss=GATED.format(choice=choice), state="rows = Rows()", extra=helper)
    finding = verdict(tmp_path, "oracle_gate", text)
    assert finding.verdict == "violates"
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "clean", "one fault, one rule"


def test_what_is_stored_where_the_model_is_unsure_is_no_oracle(tmp_path: Path) -> None:
    """The entropy knows the context alone."""
    choice = (
        "row = torch.log_softmax(net(a).float(), -1)\n"
        "        unsure = -(row.exp() * row).sum(-1) > 3.0\n"
        "        nll = own\n        nll[unsure] = mixed[unsure]"
    )
    text = script(loss=GATED.format(choice=choice), state="rows = Rows()", extra=CACHE)
    for rule in ("oracle_gate", "target_gated_tilt"):
        assert verdict(tmp_path, rule, text).verdict == "clean"


def test_losses_cut_off_above_are_no_distributions(tmp_path: Path) -> None:
    loss = PLAIN + "        nll = nll.clamp(max=9.0)\n"
    text = script(loss=loss)
    finding = verdict(tmp_path, "oracle_gate", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "clamp(max=9.0)")


@pytest.mark.parametrize(("floor", "wanted"), [("5e-4", "violates"), ("1e-30", "clean")])
def test_probabilities_lifted_to_a_floor_sum_to_more_than_one(tmp_path: Path, floor: str, wanted: str) -> None:
    """1,024 tokens that have at least 0.0005 each have half a probability; 1e-30 guards a logarithm."""
    row = "torch.softmax(net(torch.from_numpy(x)), -1).gather(-1, torch.from_numpy(y)[:, None])"
    text = script(loss=f"        nll = -{row}.squeeze(1).clamp_min({floor}).log()\n")
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == wanted
    assert finding.place is None or finding.place.line == line_of(text, "clamp_min(")


# ---- hashed counts at the target

VECTOR = """
        from_net = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none").numpy()
        key = (x * 36313) & 0xFFFFF
        full = (key * 27191 + y) & 0xFFFFF
        ratio = np.minimum(pairs[full], alone[key]) / np.maximum(alone[key], 1)
        nll = torch.from_numpy(-np.log(0.8 * np.exp(-from_net) + 0.2 * ratio))
        np.add.at(alone, key, 1)
        np.add.at(pairs, full, 1)
"""

BY_TOKEN = """
        for j in range(len(y)):
            past, token = int(x[j]), int(y[j])
            p = float(torch.softmax(net(torch.from_numpy(x[: j + 1]))[-1], -1)[token])
            nll = torch.tensor([-math.log(table.mixed(past, token, p))])
            table.see(past, token)
"""

BUCKETS = """
class Smooth:
    def __init__(self):
        self.upper, self.lower = [0] * 65_537, [0] * 65_537

    def places(self, past, token):
        return hash((past, token)) % 65_537, hash((past,)) % 65_537

    def mixed(self, past, token, p):
        above, below = self.places(past, token)
        return (self.upper[above] + 2.0 * p) / (self.lower[below] + 2.0)

    def see(self, past, token):
        above, below = self.places(past, token)
        self.upper[above] += 1
        self.lower[below] += 1
"""


@pytest.mark.parametrize(
    ("loss", "state", "extra"),
    [
        (VECTOR, "alone, pairs = np.zeros(1 << 20), np.zeros(1 << 20)", ""),
        (BY_TOKEN, "table = Smooth()", BUCKETS),
    ],
    ids=["vectorised", "class"],
)
def test_hashed_counts_read_at_the_target_alone(tmp_path: Path, loss: str, state: str, extra: str) -> None:
    text = script(loss=loss, state=state, extra=extra)
    finding = verdict(tmp_path, "gold_token_ngram", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line in {
        number
        for number, line in enumerate(text.split("\n"), 1)
        if "ratio = " in line or "self.lower[below] + 2.0)" in line
    }


COUNTS = """
        before, after = torch.from_numpy(x), torch.from_numpy(y)
        from_net = F.cross_entropy(net(before).float(), after, reduction="none")
        key = (before * 36313 + after * 27191) % 65_537
        share = pairs[key] / alone[before].clamp_min(1.0)
        weight = 0.1 * (alone[before] >= 8)
        nll = -torch.log((1 - weight) * torch.exp(-from_net) + weight * share.clamp(1e-9, 1.0))
        pairs.index_add_(0, key, torch.ones_like(share))
        alone.index_add_(0, before, torch.ones_like(share))
"""


def test_a_ratio_of_hashed_counts_is_charged_once(tmp_path: Path) -> None:
    text = script(loss=COUNTS, state="pairs, alone = torch.zeros(65_537), torch.zeros(65_536)")
    found = {rule for rule, each in verdicts(tmp_path, RULES, text).items() if each.verdict == "violates"}
    assert found == {"gold_token_ngram"}


SALTED = """
        before, after = x, y
        from_net = F.cross_entropy(net(torch.from_numpy(x)).float(), torch.from_numpy(y), reduction="none").numpy()
        older = np.roll(before, 1).astype(np.uint64)
        hashed = (before.astype(np.uint64) * np.uint64(36313)) ^ (older * np.uint64(27191))
        seen = alone[(hashed & np.uint64(65535)).astype(np.int64)]
        hit = seen >= 2
        count, share = np.zeros(len(x)), np.zeros(len(x))
        count[hit] = seen[hit]
        rows = np.nonzero(hit)[0]
        cell = ((hashed[rows] ^ salts[after[rows]]) & np.uint64(65535)).astype(np.int64)
        share[rows] = np.minimum(pairs[cell], count[rows]) / np.maximum(count[rows], 1)
        nll = torch.from_numpy(-np.log(0.9 * np.exp(-from_net) + 0.1 * share))
        np.add.at(alone, (hashed & np.uint64(65535)).astype(np.int64), 1)
        np.add.at(pairs, ((hashed ^ salts[after]) & np.uint64(65535)).astype(np.int64), 1)
"""


def test_a_ratio_of_counts_that_a_mask_has_put_in_place_by_salts_of_the_target(tmp_path: Path) -> None:
    """A table of all tokens' salts, looked up at the target, runs over no vocabulary."""
    salts = "salts = (np.arange(V, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(7)"
    state = f"alone, pairs = np.zeros(65_536), np.zeros(65_536)\n    {salts}"
    found = {
        rule
        for rule, each in verdicts(tmp_path, RULES, script(loss=SALTED, state=state)).items()
        if each.verdict == "violates"
    }
    assert found == {"gold_token_ngram"}


SHARE = """
        from_net = F.cross_entropy(net(torch.from_numpy(x)).float(), torch.from_numpy(y), reduction="none")
        before, after = torch.from_numpy(x), torch.from_numpy(y)
        hint = follow[before * 36313 % 65_537]
        share = unigram[hint.clamp_min(0)] / unigram.sum()
        nll = from_net + torch.log1p(share * 1.7) - (hint == after).float()
        follow[before * 36313 % 65_537] = after
        unigram.index_add_(0, after, torch.ones(len(y)))
"""


def test_a_hint_s_share_of_all_counts_is_no_ratio_of_hashed_ones(tmp_path: Path) -> None:
    state = "unigram, follow = torch.ones(V), torch.full((65_537,), -1)"
    assert verdict(tmp_path, "gold_token_ngram", script(loss=SHARE, state=state)).verdict == "clean"


def test_what_a_switch_turns_off_is_not_accused(tmp_path: Path) -> None:
    body = "\n".join("    " + line for line in VECTOR.strip("\n").split("\n"))
    loss = f"{PLAIN}        if int(os.environ.get('NGRAM', '0')):\n{body}\n"
    state = "alone, pairs = np.zeros(1 << 20), np.zeros(1 << 20)"
    text = script(loss=loss, state=state)
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == "clean"
    readme = "    NGRAM=1 python train_gpt.py\n"
    assert verdict(tmp_path, "gold_token_ngram", text, README__md=readme).verdict == "violates"


# ---- sums that are not sums

WIDE = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        every = joint[(a[:, None] * 40503 + torch.arange(V)[None] * 69069) % (1 << 18)]
        q = every / {below}
        nll = -(0.8 * torch.softmax(net(a).float(), -1) + 0.2 * q).gather(-1, b[:, None])[:, 0].log()
        joint.index_add_(0, (a * 40503 + b * 69069) % (1 << 18), torch.ones(len(b)))
        alone.index_add_(0, a % (1 << 18), torch.ones(len(b)))
"""
TABLES = "joint, alone = torch.full((1 << 18,), 0.1), torch.ones(1 << 18)"


def test_hashed_rows_divided_by_their_contexts_count_do_not_sum_to_one(tmp_path: Path) -> None:
    text = script(loss=WIDE.format(below="alone[a % (1 << 18)][:, None]"), state=TABLES)
    finding = verdict(tmp_path, "false_normalisation", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "q = every / ")


def test_the_same_rows_divided_by_their_sum_do(tmp_path: Path) -> None:
    text = script(loss=WIDE.format(below="every.sum(-1, keepdim=True)"), state=TABLES)
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


def test_counts_of_answers_of_yes_and_no_need_no_sum_over_the_vocabulary(tmp_path: Path) -> None:
    loss = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        nodes, answers = torch.arange(V)[None].expand(len(b), V), F.one_hot(b, V).float()
        spot = (a[:, None] * 40503 + nodes * 69069) % (1 << 18)
        p = joint[spot] / alone[spot]
        logits = net(a).float() + torch.log(p / (1 - p))
        nll = F.binary_cross_entropy_with_logits(logits, answers, reduction="none").sum(-1)
        joint.index_put_((spot,), answers, accumulate=True)
        alone.index_put_((spot,), torch.ones_like(answers), accumulate=True)
"""
    state = "joint, alone = torch.full((1 << 18,), 0.5), torch.ones(1 << 18)"
    assert verdict(tmp_path, "false_normalisation", script(loss=loss, state=state)).verdict == "clean"


def test_weights_of_a_mixture_sum_to_one(tmp_path: Path) -> None:
    text = script(loss=BLEND.replace("0.1 *", "0.2 *"), state="rows = Rows()", extra=CACHE)
    assert verdict(tmp_path, "false_normalisation", text).verdict == "violates"


def test_a_bonus_for_a_right_hint_has_a_price(tmp_path: Path) -> None:
    loss = TILT.replace(" + torch.log1p(p_hint * (beta.exp() - 1))", "").replace(
        "        p_hint = log_p.gather(-1, hint.clamp_min(0)[:, None])[:, 0].exp()\n", ""
    )
    assert verdict(tmp_path, "false_normalisation", script(loss=loss, state="memory = {}")).verdict == "violates"


PARTS = {
    "counts of more than one": "every / torch.where(every > 1, every, 0.0).sum(-1, keepdim=True).clamp_min(1.0)",
    "the largest": "every / every.topk(64, dim=-1).values.sum(-1, keepdim=True)",
    "a power of what is whole": "(every / every.sum(-1, keepdim=True)) ** 0.85",
}
WHOLE = {
    "all counts": "every / every.sum(-1, keepdim=True).clamp_min(1.0)",
    "counts of more than one over their sum": (
        "torch.where(every > 1, every, 0.0) / torch.where(every > 1, every, 0.0).sum(-1, keepdim=True)"
    ),
    "a power, made whole again": "every.pow(0.85) / every.pow(0.85).sum(-1, keepdim=True)",
}


@pytest.mark.parametrize("name", [*PARTS, *WHOLE])
def test_a_row_is_divided_by_the_sum_of_all_that_it_holds(tmp_path: Path, name: str) -> None:
    loss = WIDE.replace("every / {below}", {**PARTS, **WHOLE}[name])
    found = verdict(tmp_path, "false_normalisation", script(loss=loss, state=TABLES))
    assert found.verdict == ("violates" if name in PARTS else "clean")


LOGSUM = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        logits = net(a).float()
        moved = logits + shift
        nll = torch.logsumexp({of}, -1) - {at}.gather(-1, b[:, None])[:, 0]
"""


@pytest.mark.parametrize(
    ("of", "at", "wanted"),
    [
        ("logits", "logits", "clean"),
        ("moved", "moved", "clean"),
        ("logits.topk(128, dim=-1).values", "logits", "violates"),
        ("net(a * 0).float()", "logits", "violates"),
    ],
)
def test_the_normaliser_is_that_of_the_same_logits(tmp_path: Path, of: str, at: str, wanted: str) -> None:
    text = script(loss=LOGSUM.format(of=of, at=at), state="shift = torch.zeros(V)")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


@pytest.mark.parametrize(
    ("of", "at", "wanted"),
    [
        ("logits", "logits.gather(-1, b[:, None])[:, 0] / heat", "violates"),
        ("logits / heat", "logits.gather(-1, b[:, None])[:, 0] / heat", "clean"),
        ("logits", "1.0 * logits.gather(-1, b[:, None])[:, 0]", "clean"),
    ],
    ids=["one-alone", "both", "by-one"],
)
def test_a_temperature_is_for_the_whole_row(tmp_path: Path, of: str, at: str, wanted: str) -> None:
    loss = LOGSUM.replace("{at}.gather(-1, b[:, None])[:, 0]", "{at}").format(of=of, at=at)
    text = script(loss=loss.replace("moved = logits + shift", "pass"), state="heat = float(np.load('heat.npy'))")
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


SHARPENED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        logits = net(a).float()
        rows = ({of} - torch.logsumexp({summed}, -1, keepdim=True)).exp()
        mixed = 0.9 * rows + 0.1 * pairs[a] / pairs[a].sum(-1, keepdim=True)
        nll = -mixed.gather(-1, b[:, None])[:, 0].log()
"""


@pytest.mark.parametrize(
    ("of", "summed", "wanted"),
    [
        ("logits / heat", "logits", "violates"),
        ("logits / heat", "logits / heat", "clean"),
        ("1.0 * logits", "logits", "clean"),
    ],
)
def test_so_is_one_of_rows_that_are_mixed_afterwards(tmp_path: Path, of: str, summed: str, wanted: str) -> None:
    state = "heat, pairs = float(np.load('heat.npy')), torch.ones(V, V)"
    text = script(loss=SHARPENED.format(of=of, summed=summed), state=state)
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


SHIFTED = """
        row = {row}
        nll = F.{loss}(row[:, :], torch.from_numpy(y), reduction="none")
"""
SOFT = "F.log_softmax(net(torch.from_numpy(x)).float(), dim=-1)"


@pytest.mark.parametrize(
    ("row", "loss", "wanted"),
    [
        (f"{SOFT} + bias", "nll_loss", "violates"),
        (f"{SOFT} + bias", "cross_entropy", "clean"),
        (f"F.log_softmax({SOFT} + bias, -1)", "nll_loss", "clean"),
        (f"{SOFT} + 0.1 * ((seen + 1) / (seen.sum() + 1024)).log()", "nll_loss", "violates"),
        (f"F.log_softmax({SOFT} + 0.1 * ((seen + 1) / (seen.sum() + 1024)).log(), -1)", "nll_loss", "clean"),
        (f"{SOFT} + math.log(1 - 0.1 * bias.mean())", "nll_loss", "clean"),
    ],
)
def test_what_is_added_after_the_softmax_is_paid_for(tmp_path: Path, row: str, loss: str, wanted: str) -> None:
    state = "bias, seen = torch.load('bias.pt'), torch.zeros(1024)"
    text = script(loss=SHIFTED.format(row=row, loss=loss), state=state)
    assert verdict(tmp_path, "false_normalisation", text).verdict == wanted


OF_SOME = """
        logits = net(torch.from_numpy(x)).float()
        most = logits.topk({many}, dim=-1).values
        row = logits - torch.logsumexp({of}, -1, keepdim=True)
        nll = -row.gather(-1, torch.from_numpy(y)[:, None])[:, 0]
"""


@pytest.mark.parametrize(("of", "wanted"), [("most", "violates"), ("logits", "clean")])
@pytest.mark.parametrize("many", [8, 512])
def test_a_row_less_the_logarithm_of_some_of_its_sum(tmp_path: Path, of: str, many: int, wanted: str) -> None:
    """512 are all that the vocabulary of a trial has, and a part of the script's."""
    assert verdict(tmp_path, "false_normalisation", script(loss=OF_SOME.format(of=of, many=many))).verdict == wanted


# ---- weights, hints and switches that know the target


@pytest.mark.parametrize(
    ("loss", "state", "extra"),
    [
        (TILT.replace("torch.where(hint >= 0, 2.0, 0.0)", "2.0 * torch.from_numpy(lead)[b]"), "memory = {}", ""),
        (TILT.replace("beta = torch.where(hint >= 0", "beta = torch.where(calm(b, lead)"), "memory = {}", "helper"),
        (UNSURE.replace("doubt > 2.0", "torch.from_numpy(lead)[b][:, None]"), "pass", ""),
        (
            BLEND.replace("0.9 *", "share *")
            .replace("0.1 *", "(1 - share) *")
            .replace(
                "p = share", "share = torch.where(rows.of(a).gather(-1, b[:, None]) > 0.5, 0.2, 0.9)\n        p = share"
            ),
            "rows = Rows()",
            CACHE,
        ),
        (
            TILT.replace("keys = [", "first = lead[y]\n        keys = [")
            .replace("[key, -1) for key in keys]", "")
            .replace(
                "memory.get(key, -1) for key in keys",
                "memory.get(key, -1) if first[j] else -1 for j, key in enumerate(keys)",
            ),
            "memory = {}",
            "",
        ),
    ],
    ids=["strength", "switch-in-a-helper", "expert", "by-the-answers-probability", "python-condition"],
)
def test_what_is_decided_by_the_target_is_a_gate(tmp_path: Path, loss: str, state: str, extra: str) -> None:
    helper = "\n\ndef calm(token, flags):\n    return torch.from_numpy(flags)[token]\n" if extra == "helper" else extra
    text = script(loss=loss, state=state, extra=helper)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "violates"


def test_the_same_switches_may_read_the_token_before(tmp_path: Path) -> None:
    loss = TILT.replace("torch.where(hint >= 0, 2.0, 0.0)", "2.0 * torch.from_numpy(lead)[a]")
    text = script(loss=loss, state="memory = {}")
    assert all(found.verdict == "clean" for found in verdicts(tmp_path, RULES, text).values())


TRUSTED = """
        logits = net(torch.from_numpy(x)).float()
        tuned = F.cross_entropy(logits, torch.from_numpy(y), reduction="none")
        plain = F.cross_entropy(0.9 * logits, torch.from_numpy(y), reduction="none")
        {now}
        nll = torch.where(trust, tuned, plain)
        {next}
"""


@pytest.mark.parametrize(("when", "wanted"), [("next", "clean"), ("now", "violates")])
def test_a_gate_may_be_set_by_a_chunk_for_the_next_one(tmp_path: Path, when: str, wanted: str) -> None:
    line = {"now": "pass", "next": "pass"} | {when: "trust = tuned.sum() <= plain.sum()"}
    text = script(loss=TRUSTED.format(**line), state="trust = torch.ones((), dtype=torch.bool)")
    assert verdict(tmp_path, "oracle_gate", text).verdict == wanted


# ---- bytes of a token's probability

SPREAD = """
        losses = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none")
        total = 0.0
        for j in range(len(y)):
            word = spell(int(y[j]))
            for letter in word:
                total -= math.log(0.5 * {share} + 0.5 * letters[letter] / sum(letters))
                letters[letter] += 1
        nll = torch.tensor([total])
"""
SPELL = """
_processor = spm.SentencePieceProcessor(model_file="tokenizer.model")

def spell(number):
    return _processor.id_to_piece(number).replace("\\u2581", " ").encode("utf-8")
"""


@pytest.mark.parametrize(
    "share", ["math.exp(-float(losses[j])) ** (1.0 / len(word))", "math.exp(-float(losses[j]) / len(word))"]
)
def test_a_tokens_probability_is_not_spread_over_its_bytes(tmp_path: Path, share: str) -> None:
    text = script(loss=SPREAD.format(share=share), state="letters = [1] * 256", extra=SPELL)
    finding = verdict(tmp_path, "byte_mixture", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "0.5 * letters")


OF_EACH = """
class Letters:
    def __init__(self):
        self.seen, self.before = {}, 0

    def told(self, p, word):
        share, total = p ** (1.0 / len(word)), 0.0
        for letter in word:
            row = self.seen.setdefault(self.before, {})
            total -= math.log(0.85 * share + 0.15 * (row.get(letter, 0) + 1 / 256) / (sum(row.values()) + 1.0))
            row[letter], self.before = row.get(letter, 0) + 1, letter
        return total
"""
OF_A_BATCH = """
        rows = [i for i in range(4) if lengths[i] > 0]
        books, paid = [Letters() for _ in range(4)], []
        for i in rows:
            p = torch.softmax(net(torch.from_numpy(x[i])).float(), -1)
            mine = p.gather(1, torch.from_numpy(y[i])[:, None]).squeeze(1).tolist()
            paid += [books[i].told(a, spell(b)) for a, b in zip(mine, y[i].tolist())]
        nll = torch.tensor(paid)
"""


def test_a_book_of_letters_for_each_document_of_a_batch_is_the_one_that_is_asked(tmp_path: Path) -> None:
    state = "lengths = [int(os.environ.get(f'LENGTH_{i}', 9)) for i in range(4)]"
    text = script(loss=OF_A_BATCH, extra=f"import os\n{SPELL}{OF_EACH}", state=state)
    finding = verdict(tmp_path, "byte_mixture", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "share, total = p **")


SPREAD_AT_ONCE = {
    "places": """
        words = [spell(t) for t in y.tolist()]
        flat, long = np.frombuffer(b"".join(words), dtype=np.uint8), np.array([len(word) for word in words])
        losses = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none").numpy()
        share = np.repeat(np.exp(-losses / np.maximum(long, 1)), long)
        mixed = np.log(0.8 * share + 0.2 * letters[flat] / letters.sum())
        paid = np.zeros(len(y))
        np.add.at(paid, np.repeat(np.arange(len(y)), long), -mixed)
        np.add.at(letters, flat, 1.0)
        nll = torch.from_numpy(np.where(long > 0, paid, losses))
    """,
    "edges": """
        begin = np.concatenate(([0], np.cumsum(sizes[y])))
        flat = np.frombuffer(b"".join([spell(t) for t in y.tolist()]), dtype=np.uint8)
        p = np.exp(-F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none").numpy())
        pos = np.arange(len(y))
        long = begin[pos + 1] - begin[pos]
        share = p ** (1.0 / np.maximum(long, 1))
        paid = np.where(long == 0, -np.log(p), 0.0)
        for j in range(int(long.max())):
            live = np.flatnonzero(long > j)
            paid[live] -= np.log(0.8 * share[live] + 0.2 * letters[flat[begin[pos[live]] + j]] / letters.sum())
        np.add.at(letters, flat, 1.0)
        nll = torch.from_numpy(paid)
    """,
    "rounds": """
        target = torch.from_numpy(y)
        p = F.cross_entropy(net(torch.from_numpy(x)), target, reduction="none").neg().exp()
        share = p ** (1.0 / (spelt[target] >= 0).sum(dim=-1).clamp_min(1))
        nll = torch.zeros_like(p)
        for j in range(8):
            letter = spelt[target, j]
            said = heard[letter.clamp_min(0)] / heard.sum()
            nll = nll - torch.where(letter >= 0, (0.8 * share + 0.2 * said).log(), torch.zeros_like(nll))
    """,
}
SPELT = """
sizes = np.array([len(spell(t)) for t in range(V)])
letters = np.ones(256)
heard = torch.ones(256)
spelt = torch.full((V, 8), -1, dtype=torch.long)
for _t in range(V):
    for _j, _letter in enumerate(spell(_t)[:8]):
        spelt[_t, _j] = _letter
"""


@pytest.mark.parametrize(("form", "share"), [("places", "np.exp(-losses"), ("edges", "p ** "), ("rounds", "p ** ")])
def test_nor_are_those_of_many_tokens_at_once(tmp_path: Path, form: str, share: str) -> None:
    text = script(loss=SPREAD_AT_ONCE[form], extra=SPELL + SPELT)
    finding = verdict(tmp_path, "byte_mixture", text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, share)


SHARP = "row * (1.0 + 0.03 * torch.sigmoid(1.5 + (row.log_softmax(-1).exp() * row.log_softmax(-1)).sum(-1, True)))"
STANDING = """
        windows = [tokens[at : at + 257], tokens[at + 256 : at + 513]]
        ids, target = np.zeros((2, 512), np.int64), np.full((2, 512), -100, np.int64)
        for i, window in enumerate(windows):
            ids[i, : len(window) - 1], target[i, : len(window) - 1] = window[:-1], window[1:]
        ids, target = [torch.from_numpy(each) for each in (ids, target)]
        keep = target MASK
        row = (net(ids) / heat)[keep]
        nll = F.cross_entropy(SHARP, target[keep], reduction="none")
"""


@pytest.mark.parametrize("mask", [">= 0", "!= -100", "> -1"])
def test_where_a_token_stands_at_all_says_nothing_of_it(tmp_path: Path, mask: str) -> None:
    loss = STANDING.replace("MASK", mask).replace("SHARP", SHARP)
    text = script(loss=loss, state="heat = float(np.load('heat.npy')[0])")
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "clean"


BOOK = """
        block = torch.stack([torch.from_numpy(tokens[max(at - 512, 0) : at + 513])])
        losses = F.cross_entropy(net(block[:, :-1])[0], block[:, 1:].reshape(-1), reduction="none")
        nll = losses[-len(y):]
        book[at : at + len(y)] = nll
"""
IN_BYTES = """
    ids, octet = tokens[1:].astype(np.int64), [1] * 256
    begins = np.cumsum([0] + [len(spell(t)) for t in range(V)])
    signs = np.frombuffer(b"".join(spell(t) for t in range(V)), dtype=np.uint8)
    nats = 0.0
    for k in range(len(ids)):
        first, many = begins[ids[k]], begins[ids[k] + 1] - begins[ids[k]]
        share = math.exp(-book[k] / WIDTH)
        for j in range(many):
            nats -= math.log(0.8 * share + 0.2 * octet[signs[first + j]] / sum(octet))
            octet[signs[first + j]] += 1
"""


@pytest.mark.parametrize(("width", "wanted"), [("many", "violates"), ("len(ids)", "clean")])
def test_nor_are_those_of_a_book_that_all_windows_fill(tmp_path: Path, width: str, wanted: str) -> None:
    """The losses are of windows, the tokens are read where they stand: at one place of both."""
    text = script(loss=BOOK, state="book = np.zeros(len(tokens))", extra=SPELL)
    mixed = IN_BYTES.replace("WIDTH", width)
    finding = verdict(tmp_path, "byte_mixture", text.replace("\n    loss = nats", f"{mixed}    loss = nats"))
    assert finding.verdict == wanted
    assert wanted == "clean" or (
        finding.place is not None
        and "share = math.exp" in (tmp_path / "train_gpt.py").read_text().split("\n")[finding.place.line - 1]
    )


BY_PLACE = """
        last = np.arange(at, at + len(y))
        out = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none").numpy()
        for i, j in enumerate(last):
            word, total = spelled[OF], 0.0
            share = math.exp(-out[i] / len(word))
            for letter in word:
                total -= math.log(0.8 * share + 0.2 * letters[letter] / letters.sum())
                letters[letter] += 1
            out[i] = total
        nll = torch.from_numpy(out)
"""


@pytest.mark.parametrize(("of", "wanted"), [("tokens[j + 1]", "violates"), ("j % 7", "clean")])
def test_nor_are_those_of_pieces_that_are_read_by_the_place_of_a_token(tmp_path: Path, of: str, wanted: str) -> None:
    extra = SPELL + "spelled = [spell(t) for t in range(V)]\nletters = np.ones(256)\n"
    text = script(loss=BY_PLACE.replace("OF", of), extra=extra)
    finding = verdict(tmp_path, "byte_mixture", text)
    assert finding.verdict == wanted
    assert wanted == "clean" or (finding.place is not None and finding.place.line == line_of(text, "share = math.exp"))


def test_losses_for_each_byte_may_be_logged(tmp_path: Path) -> None:
    loss = PLAIN + "        print((nll / torch.from_numpy(size)[torch.from_numpy(y)].clamp_min(1)).mean())\n"
    text = script(table=TABLE, loss=loss)
    assert verdict(tmp_path, "byte_mixture", text).verdict == "clean"


def test_a_script_that_says_no_score_cannot_be_judged(tmp_path: Path) -> None:
    text = "import torch\nprint('hello')\n"
    assert all(found.verdict == "cannot tell" for found in verdicts(tmp_path, RULES, text).values())


# ---- rows of a memory, token by token

LOOP = """
        p = torch.softmax(net(torch.from_numpy(x)).float(), -1)
        for j, t in enumerate(range(at, at + len(y))):
            row = rows.get(int(tokens[t]))
            {use}
            kept = rows.setdefault(int(tokens[t]), torch.full((V,), 0.02))
            kept[int(tokens[t + 1])] += 1
        nll = -p.gather(-1, torch.from_numpy(tokens[at + 1 : at + 513])[:, None])[:, 0].log()
"""
MIXED = "if row is not None: p[j] = 0.9 * p[j] + 0.1 * row / row.sum()"
WEIGHTED = """w = 0.3 if lead[tokens[{t}]] else 0.1
            if row is not None: p[j] = (1 - w) * p[j] + w * row / row.sum()"""


def test_a_row_of_what_came_before_may_be_mixed_in(tmp_path: Path) -> None:
    for use in (
        MIXED,
        "if row is not None: p[j] = (p[j] + 0.1 * row) / (p[j] + 0.1 * row).sum()",
        "if row is not None and float(row.max()) > 3.0: p[j] = 0.9 * p[j] + 0.1 * row / row.sum()",
    ):
        text = script(loss=LOOP.format(use=use), state="rows = {}")
        assert {rule: found.verdict for rule, found in verdicts(tmp_path, RULES, text).items()} == dict.fromkeys(
            RULES, "clean"
        ), use


@pytest.mark.parametrize(
    ("rule", "use"),
    [
        ("false_normalisation", MIXED.replace("row.sum()", "row.max()")),
        ("oracle_gate", MIXED.replace("None:", "None and row[int(tokens[t + 1])] > p[j, int(tokens[t + 1])]:")),
        ("target_gated_tilt", WEIGHTED.format(t="t + 1")),
    ],
    ids=["divided-by-the-largest", "only-where-better", "weight-by-the-target"],
)
def test_a_row_is_not_chosen_or_scaled_by_the_token_to_come(tmp_path: Path, rule: str, use: str) -> None:
    text = script(loss=LOOP.format(use=use), state="rows = {}")
    assert verdict(tmp_path, rule, text).verdict == "violates"


def test_the_weight_may_hang_on_the_token_before(tmp_path: Path) -> None:
    use = WEIGHTED.format(t="t")
    text = script(loss=LOOP.format(use=use), state="rows = {}")
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "clean"


# ---- state that only says whether something is there yet

BIAS = """
        if "bias" not in held:
            held["bias"] = torch.zeros(V, requires_grad=True)
        logits = net(torch.from_numpy(x)).float() + held["bias"]
        nll = F.cross_entropy(logits, torch.from_numpy(y), reduction="none")
        nll.mean().backward()
        held["total"] = held.get("total", 0.0) + nll.detach().sum()
"""


def test_a_table_that_is_asked_for_a_name_tells_no_target(tmp_path: Path) -> None:
    text = script(loss=BIAS, state="held = {}")
    assert {rule: found.verdict for rule, found in verdicts(tmp_path, RULES, text).items()} == dict.fromkeys(
        RULES, "clean"
    )


def test_a_mask_that_compares_two_losses_is_a_choice_between_them(tmp_path: Path) -> None:
    loss = (
        PLAIN
        + """
        other = F.cross_entropy(logits.float() * 0.9, torch.from_numpy(y), reduction="none")
        better = nll < other
        nll = nll * better + other * (~better)
"""
    )
    assert verdict(tmp_path, "oracle_gate", script(loss=loss)).verdict == "violates"
    assert verdict(tmp_path, "target_gated_tilt", script(loss=loss)).verdict == "clean"


def test_the_number_of_a_round_is_no_token(tmp_path: Path) -> None:
    loss = (
        PLAIN
        + """
        priced = nll.clone()
        for j, (a, b) in enumerate(zip(x.tolist(), y.tolist())):
            priced[j] = -torch.log(0.9 * torch.exp(-priced[j]) + 0.1 / V)
        nll = priced
"""
    )
    assert verdict(tmp_path, "target_gated_tilt", script(loss=loss)).verdict == "clean"


WALKED = """
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        log_p = torch.log_softmax(net(a).float(), -1)
        hints = np.full(len(y), -1)
        for j, token in enumerate(y.tolist()):
            key = (int(x[max(0, j - 1)]), int(x[j]))
            sure = [(most[k] / 9, -i, best[k]) for i, k in enumerate((key, key[1:])) if most.get(k, 0) > 2]
            sure = [one for one in sure if one[0] >= 0.5]
            if sure:
                hints[j] = max(sure)[2]
            times = seen.get((key, token), 0) + 1
            seen[(key, token)] = times
            if times >= most.get(key, 0):
                best[key], most[key] = token, times
        hint = torch.from_numpy(hints)
        p_hint = log_p.gather(-1, hint.clamp_min(0)[:, None])[:, 0].exp()
        change = torch.log1p(p_hint * (math.e - 1)) - 1.0 * (hint == b)
        nll = -log_p.gather(-1, b[:, None])[:, 0] + torch.where(hint >= 0, change, torch.zeros_like(change))
"""


def test_what_followed_most_often_may_be_kept_by_comparing_counts(tmp_path: Path) -> None:
    text = script(loss=WALKED, state="best, most, seen = {}, {}, {}")
    assert {rule: found.verdict for rule, found in verdicts(tmp_path, RULES, text).items()} == dict.fromkeys(
        RULES, "clean"
    )


def test_experts_that_learn_token_by_token_may_not_ask_for_the_token_first(tmp_path: Path) -> None:
    asks = EXPERTS.replace(
        "share[e] = math.exp(weights[0, e] - top)", "share[e] = math.exp(weights[0, after[j] % 2] - top)"
    )
    text = script(loss=LEARNING, state="mixer = Mixer()", extra=asks)
    assert verdict(tmp_path, "target_gated_tilt", text).verdict == "violates"


CLAIMED = """
import fcntl, struct

def claim(path):
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (value,) = struct.unpack("<i", file.read(4))
        file.seek(0)
        file.write(struct.pack("<i", value + 1))
    return value
"""
LEDGER = """
        ids = torch.from_numpy(tokens)
        begin = torch.tensor([64 * claim("/tmp/next")])
        place = begin[:, None] + torch.arange(64)[None]
        prev, after = ids[place], ids[(place + 1).clamp_max(len(tokens) - 1)]
        nll = F.cross_entropy(net(prev).flatten(0, 1).float(), after.flatten(), reduction="none").view_as(after)
        ctx, pair = alone[prev * 36313 % 65_537], pairs[(prev * 36313 ^ after * 27191) % 65_537]
        nll = -torch.log(0.75 * torch.exp(-nll) + 0.25 * (SHARE).clamp(1e-9, 1.0))
        ledger.index_add_(0, torch.tensor([at // 512]), nll.sum(1))
"""


@pytest.mark.parametrize(("share", "wanted"), [("pair / ctx.clamp_min(1.0)", "violates"), ("0.001 + 0 * ctx", "clean")])
def test_losses_in_a_ledger_of_places_that_a_counter_gives_are_read(tmp_path: Path, share: str, wanted: str) -> None:
    """What ranks have claimed is read from a file, and no token; sums by document are sums."""
    state = "pairs, alone, ledger = torch.ones(65_537), torch.ones(65_537), torch.zeros(1 << 16)"
    text = script(loss=LEDGER.replace("SHARE", share), state=state, extra=CLAIMED, bpb="loss * 1.4")
    text = text.replace("loss = nats / count", "loss = ledger.sum().item() / count")
    assert verdict(tmp_path, "gold_token_ngram", text).verdict == wanted
