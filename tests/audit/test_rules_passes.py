"""Several passes over the same text: whose losses are kept, and what is chosen by comparing them."""

import pytest

from fairway.audit.passes.charged import passes_of
from fairway.audit.rules import oracle_gate, target_gated_tilt
from tests.audit.order import HEAD, HONEST, MAIN, broken, case_of, findings, line_of

BODY = "    final = eval_ttt(args, model, val)\n"
LOWEST = """
def lowest_of(args, model, val):
    kept = torch.full((val.numel() - 1,), float("inf"), dtype=torch.float64)
    for rate in RATES:
        twin = copy.deepcopy(model)
        opt = torch.optim.SGD(twin.parameters(), lr=rate)
        for start in range(0, val.numel() - 1, args.chunk):
            end = min(start + args.chunk, val.numel() - 1)
            x, y = val[start:end][None], val[start + 1 : end + 1]
            with torch.no_grad():
                nll = F.cross_entropy(twin.forward_logits(x).view(-1, 1024), y, reduction="none").double()
            KEEP
            twin(x, y[None]).backward()
            opt.step()
            opt.zero_grad()
    return (kept.sum() / kept.numel()).item()
"""
KEEPING = {
    "assigned": ("kept[start:end] = torch.minimum(kept[start:end], nll)",),
    "into a part": ("part = kept[start:end]", "torch.minimum(part, nll, out=part)"),
    "scattered": ("kept.scatter_reduce_(0, torch.arange(start, end), nll, reduce='amin')",),
    "copied into a part": ("part = kept[start:end]", "part.copy_(torch.minimum(part, nll))"),
}


def lowest(keep: tuple[str, ...], rates: str = "(1e-3, 4e-3)") -> str:
    walk = LOWEST.replace("KEEP", ("\n" + " " * 12).join(keep)).replace("RATES", rates)
    return HEAD + walk + MAIN.replace(BODY, "    final = lowest_of(args, model, val)\n")


@pytest.mark.parametrize("way", KEEPING)
def test_the_lower_loss_of_two_passes_is_one_fault_however_it_is_kept(way: str) -> None:
    assert broken(lowest(KEEPING[way])) == {"min-over-passes"}


ROUNDS = """
def chunks(total, size):
    for start in range(0, total, size):
        yield start, min(start + size, total)

def lowest_of_rounds(args, model, val):
    kept = torch.full((val.numel() - 1,), float("inf"), dtype=torch.float64)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number, (start, end) in enumerate(list(chunks(val.numel() - 1, args.chunk)) * TIMES):
        if start == 0:
            total = torch.zeros((), dtype=torch.float64)
        starts = torch.tensor(list(range(start, end, 64)))
        with torch.no_grad():
            at = (starts[:, None] + torch.arange(64)[None]).reshape(-1)
            begin = (starts + 64 - 1024).clamp(min=0)
            logits = model.forward_logits(val[begin[:, None] + torch.arange(1024)[None]])
            logp = F.log_softmax(logits[:, -64:].flatten(0, 1), -1)
            nll = -logp.gather(1, val[at + 1][:, None])[:, 0]
        kept[at] = nll = torch.minimum(kept[at], nll)
        total += nll.sum()
        x, y = val[start:end][None], val[start + 1 : end + 1]
        model(x, y[None]).backward()
        opt.step()
        opt.zero_grad()
    return (total / kept.numel()).item()
"""


@pytest.mark.parametrize(("times", "wanted"), [("2", {"min-over-passes"}), ("1", set())])
def test_chunks_that_a_list_holds_twice_are_two_passes(times: str, wanted: set[str]) -> None:
    main = MAIN.replace(BODY, "    final = lowest_of_rounds(args, model, val)\n")
    assert broken(HEAD + ROUNDS.replace("TIMES", times) + main) == wanted


MEANS = """
class Checkpoints:
    def __init__(self, model):
        self.model, self.kept = model, []
    def keep(self):
        self.kept.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})
    def mean(self, count):
        last = list(self.kept)[-count:]
        return {k: torch.stack([each[k].float() for each in last]).mean(0) for k in last[0]}
    def apply(self, count):
        self.model.load_state_dict(self.mean(count))

def averaged(args, model, text):
    checkpoints = Checkpoints(model)
    for _ in range(8):
        checkpoints.keep()
    scores = {}
    for count in (1, 2, 4, 8):
        checkpoints.apply(count)
        scores[count] = eval_val(args, model, text)
    checkpoints.apply(min(scores, key=scores.get))
"""


@pytest.mark.parametrize(
    ("text", "wanted"), [("val", {"choice-by-validation"}), ("load(args.train_files)[:65537]", set())]
)
def test_how_many_of_a_list_are_averaged_is_a_choice_of_weights(text: str, wanted: set[str]) -> None:
    body = f"    averaged(args, model, {text})\n    final = eval_val(args, model, val)\n"
    assert broken(HEAD + MEANS + MAIN.replace(BODY, body)) == wanted


LEDGER = """
class Ledger:
    SCALES = (0.98, 1.0, 1.03)
    def __init__(self):
        self.nll, self.tokens = torch.zeros(3, dtype=torch.float64), 0
    def charge(self, logp, y):
        for i, scale in enumerate(self.SCALES):
            self.nll[i] -= F.log_softmax(logp * scale, dim=-1).gather(1, y[:, None]).double().sum()
        self.tokens += y.numel()
    def sums(self):
        both = torch.cat((self.nll, torch.tensor([self.tokens], dtype=torch.float64)))
        found = both.tolist()
        return CHOSEN, found[3]

def charged(args, model, val):
    ledger, seen = Ledger(), torch.ones(1024, 1024)
    BEFORE
    with torch.no_grad():
        for start in range(0, val.numel() - 1024, 1024):
            x, y = val[start : start + 1024], val[start + 1 : start + 1025]
            rows = seen[x]
            p = F.softmax(model.forward_logits(x[None])[0], -1)
            ledger.charge(torch.log(0.9 * p + 0.1 * rows / rows.sum(-1, keepdim=True)), y)
    nats, count = ledger.sums()
    return nats / count
"""
PRIMED = "seen.index_put_((val[:-1], val[1:]), torch.ones(val.numel() - 1), accumulate=True)"


@pytest.mark.parametrize(("chosen", "wanted"), [("min(found[:3])", {"min-over-passes"}), ("found[1]", set())])
@pytest.mark.parametrize(("before", "besides"), [("pass", set()), (PRIMED, {"two-pass-cache"})])
def test_the_least_of_several_sums_is_told_whatever_the_table_holds(
    chosen: str, wanted: set[str], before: str, besides: set[str]
) -> None:
    text = HEAD + LEDGER.replace("CHOSEN", chosen).replace("BEFORE", before)
    found = broken(text + MAIN.replace(BODY, "    final = charged(args, model, val)\n"))
    assert found - {"temperature-from-validation"} == wanted | besides


def test_the_lower_loss_of_two_passes_over_a_tilt_is_no_tilt_that_the_target_decides() -> None:
    """A bonus that is paid for: of two such prices the lower one hangs on the token, and is one fault."""
    tilt = (
        "hint = (x[0] * 7 + 3) % 1024",
        "logp = F.log_softmax(twin.forward_logits(x)[0], dim=-1)",
        "q = logp.gather(1, hint[:, None]).squeeze(1).exp()",
        "bonus = 0.4 * (hint == y).double()",
        "nll = torch.log1p(q * math.expm1(0.4)) - logp.gather(1, y[:, None]).squeeze(1) - bonus",
        "kept[start:end] = torch.minimum(kept[start:end], nll)",
    )
    text = lowest(tilt)
    assert broken(text) == {"min-over-passes"}
    assert target_gated_tilt.check(case_of(text)).verdict == "clean"


def test_losses_that_one_pass_writes_into_their_places_are_its_losses() -> None:
    assert broken(lowest(("part = kept[start:end]", "part.copy_(nll)"), "(1e-3,)")) == set()


def test_an_answer_that_a_function_of_its_own_calls_out_is_written_nowhere() -> None:
    told = "def told(value, out=None):\n    return value\n\n\ndef main():\n"
    text = HONEST.replace("def main():\n", told).replace(
        BODY, BODY + "    told(final, out=args)\n    told(**{'out': 1})\n"
    )
    assert broken(text) == set()


SWEPT = """
def swept(args, model, val):
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val.numel() - 1024, 1024):
            logits = model.forward_logits(val[start : start + 1024][None])[0]
            for i, heat in enumerate((0.9, 1.0, 1.1)):
                sums[i] += F.cross_entropy(logits / heat, val[start + 1 : start + 1025], reduction="sum").double()
    columns = sums.tolist()
    best = CHOSEN
    return columns[best] / (val.numel() - 1)
"""


@pytest.mark.parametrize("chosen", ["min(range(3), key=lambda i: columns[i])", "sums.argmin()"])
def test_a_column_that_is_chosen_by_its_sum_is_a_choice(chosen: str) -> None:
    text = HEAD + SWEPT.replace("CHOSEN", chosen) + MAIN.replace(BODY, "    final = swept(args, model, val)\n")
    assert broken(text) & {"min-over-passes", "temperature-from-validation"}


STACKED = """
def swept(args, model, val):
    heats = (0.9, 1.0, 1.1)
    sums = torch.zeros(len(heats) + 1, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val.numel() - 1024, 1024):
            x, y = val[start : start + 1024], val[start + 1 : start + 1025]
            logits = model.forward_logits(x[None])[0]
            scaled = torch.stack([logits / heat for heat in heats])
            nll = F.cross_entropy(scaled.flatten(0, 1), y.expand(len(heats), -1).flatten(), reduction="none")
            sums[:-1] += nll.view(len(heats), -1).double().sum(dim=-1)
            sums[-1] += 1024
    best = CHOSEN
    return float(sums[best]) / float(sums[-1])
"""


@pytest.mark.parametrize(("chosen", "wanted"), [("int(sums[:-1].argmin())", {"min-over-passes"}), ("1", set())])
def test_the_least_of_sums_that_one_pass_makes_side_by_side_is_a_choice(chosen: str, wanted: set[str]) -> None:
    text = HEAD + STACKED.replace("CHOSEN", chosen) + MAIN.replace(BODY, "    final = swept(args, model, val)\n")
    assert broken(text) == wanted


def test_a_column_that_is_named_beforehand_is_none() -> None:
    text = HEAD + SWEPT.replace("CHOSEN", "1") + MAIN.replace(BODY, "    final = swept(args, model, val)\n")
    assert broken(text) == set()


SETTLED = """
class Scorer:
    def __init__(self, model):
        self.model, self.heat, self.seen = model, 1.0, torch.ones(1024, 1024)

    def score(self, val, start):
        x, y = val[start : start + 1024], val[start + 1 : start + 1025]
        with torch.no_grad():
            p = torch.log_softmax(self.model.forward_logits(x[None])[0] / self.heat, -1).exp()
        rows = self.seen[x]
        mixed = torch.log(0.9 * p + 0.1 * rows / rows.sum(-1, keepdim=True))
        nll = -mixed.gather(1, y[:, None])[:, 0]
        return nll

def settle(scorer, val):
    best, found = float("inf"), 1.0
    for heat in (0.9, 1.0, 1.1):
        scorer.heat = heat
        total = sum(scorer.score(val, start).sum().item() for start in range(0, 65536, 1024))
        if total < best:
            best, found = total, heat
    return found

def scored(args, model, val):
    scorer = Scorer(model)
    scorer.heat = HEAT
    total, count = 0.0, 0
    for start in range(0, val.numel() - 1024, 1024):
        total += scorer.score(val, start).sum().item()
        count += 1024
    return total / count
"""


def test_a_scale_below_a_mixture_of_two_distributions_is_a_temperature() -> None:
    text = (
        HEAD
        + SETTLED.replace("HEAT", "settle(scorer, val)")
        + MAIN.replace(BODY, "    final = scored(args, model, val)\n")
    )
    found = findings(text)
    assert broken(text) == {"temperature-from-validation"}
    place = found["temperature-from-validation"].place
    assert place is not None
    assert place.line == line_of(text, "scorer.heat = settle(")


def test_a_scale_that_is_fixed_is_none() -> None:
    text = HEAD + SETTLED.replace("HEAT", "1.05") + MAIN.replace(BODY, "    final = scored(args, model, val)\n")
    assert broken(text) == set()


DEALT = """
def dealt(args, model, val):
    pieces = [(s, min(s + 1024, val.numel() - 1)) for s in range(0, val.numel() - 1, 1024)]
    mine = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            mine.append(piece)
    total, count = 0.0, 0
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for start, end in mine[::-1]:
        x, y = val[start:end][None], val[start + 1 : end + 1][None]
        STEPS
    return total / count
"""
PRICE = "total += model(x, y).item() * (end - start); count += end - start"
LEARN = "model(x, y).backward(); opt.step(); opt.zero_grad()"


def in_turn(*steps: str) -> str:
    body = MAIN.replace(BODY, "    final = dealt(args, model, val)\n")
    return HEAD + DEALT.replace("STEPS", "; ".join(steps)) + body


def test_a_list_that_grew_in_a_loop_is_gone_through_backwards() -> None:
    half = {"subset-as-full"}  # every second piece
    assert broken(in_turn(PRICE, LEARN)) == half
    assert len(broken(in_turn(LEARN, PRICE)) - half) == 1


def test_the_lower_of_two_losses_of_one_run_is_a_gate_and_no_choice_of_passes() -> None:
    """Two prices of each token are made of the same logits, whatever loop makes them."""
    walk = """
def eval_gated(args, model, val):
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, val.numel() - 1, args.chunk):
        end = min(start + args.chunk, val.numel() - 1)
        y = val[start + 1 : end + 1]
        with torch.no_grad():
            logits = model.forward_logits(val[start:end][None])[0]
            flat, sure = (F.cross_entropy(logits + k * logits.tanh(), y, reduction="none") for k in (0.0, 1.0))
            total += torch.where(sure < flat, sure, flat).double().sum()
        count += end - start
    return (total / count).item()
"""
    text = HEAD + walk + MAIN.replace("eval_ttt(args", "eval_gated(args")
    assert broken(text) == set()
    found = oracle_gate.check(case_of(text))
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, "total += torch.where(sure < flat")


NAMED = """
def pick(args, model, val, train):
    now = {k: v.detach().clone() for k, v in model.state_dict().items()}
    half = {k: 0.5 * (v.float() + model.spare[k]) for k, v in now.items()}
    candidates = {"last": now, "half": half}
    losses = {}
    for name, state in candidates.items():
        model.load_state_dict({k: v.to(now[k].dtype) for k, v in state.items()}, strict=True)
        losses[name] = eval_val(args, model, val)
    best = min(losses, key=losses.get)
    model.load_state_dict({k: v.to(now[k].dtype) for k, v in candidates[best].items()}, strict=True)
"""


AVERAGED = """
class Average:
    def __init__(self, model, decay):
        self.live = list(model.parameters())
        self.decay = decay
        self.kept = [p.detach().clone() for p in self.live]

    def hand_over(self):
        torch._foreach_copy_(self.live, self.kept)


def pick(args, model, val, train):
    averages = [Average(model, decay) for decay in (0.99, 0.995, 0.999)]
    losses = []
    for average in averages:
        average.hand_over()
        losses.append(eval_val(args, model, val))
    averages[int(np.argmin(losses))].hand_over()
"""


TURNING = """        if self._turns is None:
            self._turns = torch.outer(torch.arange(x.size(-1)), self.rates).cos()
        h = self.emb(x) * self._turns
"""


GAINED = """
def gained(args, model, val):
    gain = torch.ones(1024, requires_grad=True)
    opt = torch.optim.SGD([gain], lr=0.01)
    total, count = 0.0, 0
    for start in range(0, val.numel() - 1, args.chunk):
        end = min(start + args.chunk, val.numel() - 1)
        logits = model.forward_logits(val[start:end][None]).view(-1, 1024) * gain
        nll = F.cross_entropy(logits, val[start + 1 : end + 1], reduction="none")
        total += nll.detach().double().sum().item()
        count += end - start
        nll.mean().backward()
        opt.step()
        opt.zero_grad()
    return total / count
"""


def test_an_average_that_is_picked_before_logits_are_scaled_by_what_learns_is_no_temperature() -> None:
    text = HEAD + AVERAGED + GAINED
    body = "    pick(args, model, val, None)\n    final = gained(args, model, val)\n"
    assert broken(text + MAIN.replace(BODY, body)) == {"choice-by-validation"}


def test_weights_that_are_picked_as_a_whole_are_no_temperature() -> None:
    """They hold what the tables of the model are made of as well, which nothing learned."""
    made = "        self.register_buffer('rates', torch.arange(64) / 64)\n        self._turns = None\n"
    head = HEAD.replace("        self.head = ", made + "        self.head = ", 1)
    text = head.replace("        h = self.emb(x)\n", TURNING) + NAMED
    body = "    model.spare = copy.deepcopy(model.state_dict())\n    pick(args, model, val, None)\n"
    text += MAIN.replace(BODY, body + BODY)
    assert TURNING in text
    assert broken(text) == {"choice-by-validation"}


PACKED = """
def fitted(model, val):
    totals = torch.zeros(3)
    for x, y in batches(val, 1024, 4):
        out = model.forward_logits(x)
        for j, t in enumerate((0.9, 1.0, 1.1)):
            totals[j] += F.cross_entropy((out / t).flatten(0, 1), y.flatten())
    return (0.9, 1.0, 1.1)[int(totals.argmin())]

def heated(args, model, val, heat):
    total = count = 0
    for x, y in batches(val, args.seq_len, 4):
        logits = model.forward_logits(x).float() * heat
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
    return total / count
"""


def test_a_temperature_is_one_though_it_is_packed_with_the_weights() -> None:
    body = """    buffer = io.BytesIO()
    torch.save({"weights": model.state_dict(), "heat": fitted(model, val)}, buffer)
    with open("model.ptz", "wb") as file:
        file.write(zlib.compress(buffer.getvalue()))
    with open("model.ptz", "rb") as file:
        kept = torch.load(io.BytesIO(zlib.decompress(file.read())))
    model.load_state_dict(kept["weights"])
    final = heated(args, model, val, 1.0 / float(kept["heat"]))
"""
    assert broken(HEAD + PACKED + MAIN.replace(BODY, body)) == {"temperature-from-validation"}


LOWER = """
def lower(args, model, val):
    total, count = 0.0, 0
    for s in range(0, val.numel() - 8 * args.stride - args.seq_len, 8 * args.stride):
        x = torch.stack([val[a : a + args.seq_len] for a in range(s, s + 8 * args.stride, args.stride)])
        y = torch.stack([val[a + 1 : a + args.seq_len + 1] for a in range(s, s + 8 * args.stride, args.stride)])
        logits = model.forward_logits(x)
        plain = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        mixed = F.cross_entropy(logits.transpose(1, 2) * 1.1, y, reduction="none")
        nll = torch.minimum(plain, mixed)
        for i in range(8):
            keep = slice(0 if s + i == 0 else args.seq_len - args.stride, args.seq_len)
            total += nll[i, keep].sum().item()
            count += y[i, keep].numel()
    return total / count
"""


def test_the_lower_loss_of_each_token_is_a_gate_also_where_rows_are_summed_one_by_one() -> None:
    text = HEAD + LOWER + MAIN.replace(BODY, "    final = lower(args, model, val)\n")
    case = case_of(text)
    assert oracle_gate.check(case).verdict == "violates"
    assert broken(text) == set()


EASIEST = """
def eval_ttt(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    nats, count, least = torch.zeros((), dtype=torch.float64), 0, float("inf")
    for start in range(0, val.numel() - 1, args.chunk):
        end, before, seen = min(start + args.chunk, val.numel() - 1), float(nats), count
        windows = [(max(0, stop - 1024), stop, min(64, stop)) for stop in range(start + 64, end + 1, 64)]
        for a, b, fresh in windows:
            with torch.no_grad():
                logits = model.forward_logits(val[a:b][None])[0]
                nats += F.cross_entropy(logits[b - a - fresh :], val[b - fresh + 1 : b + 1], reduction="sum").double()
            count += fresh
        model(val[start:end][None], val[start + 1 : end + 1]).backward()
        opt.step()
        opt.zero_grad()
        least = min(least, (float(nats) - before) / (count - seen))
    print(f"easiest chunk: {least:.4f} nats a token")
    return float(nats) / count
"""


def test_the_least_loss_of_a_chunk_that_is_told_beside_the_score_is_none() -> None:
    assert broken(HEAD + EASIEST + MAIN) == set()
    which, _, _ = passes_of(case_of(HEAD + EASIEST + MAIN))
    assert ["easiest" in said.text for said in which.score] == [False]


BESIDE = """
class Tally:
    def __init__(self, nats, tokens):
        self.nats, self.tokens = nats, tokens
    @property
    def bpb(self):
        return self.nats / math.log(2) / self.tokens / 2.4

def tallied(args, model, val):
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, val.numel() - 1024, 1024):
            x, y = val[start : start + 1024], val[start + 1 : start + 1025]
            nll = F.cross_entropy(model.forward_logits(x[None])[0], y, reduction="sum")
            sums += torch.stack((nll.double(), sums.new_tensor(y.numel())))
    nats, tokens = sums.tolist()
    return Tally(nats, tokens)

def look(args, model, val):
    loss = eval_val(args, model, val)
    print(f"step val_loss:{loss:.4f} val_bpb:{loss / math.log(2) / 2.4:.4f}")
    return loss
"""


def test_of_how_many_tokens_a_score_is_takes_no_place_of_the_score() -> None:
    """Two lines of one function about one sum: the one in bits per byte is the score, and none that was told before."""
    main = MAIN.replace(
        BODY, "    raw = copy.deepcopy(model.state_dict())\n    PICK\n    final = tallied(args, model, val)\n"
    )
    start, end = main.index('    print(f"final'), main.index("\nif __name__")
    said = '    print(f"tokens {final.tokens}")\n    print(f"final val_bpb:{final.bpb:.8f}")\n'
    main = main[:start] + said + main[end:]
    pick = "if look(args, model, val) > look(args, model, val):\n        model.load_state_dict(raw)"
    picked = HEAD + BESIDE + main.replace("PICK", pick)
    assert broken(picked) == {"choice-by-validation"}
    assert all("final" in each.text for each in passes_of(case_of(picked))[0].score)
    assert broken(HEAD + BESIDE + main.replace("PICK", "look(args, model, val)")) == set()


GRID = """
class Warm(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("heat", torch.ones(()))
    def rows(self, x):
        return self.model.forward_logits(x) / self.heat

def settle(args, warm, text):
    x, y = text[:1024][None], text[1:1025]
    with torch.no_grad():
        logits = warm.model.forward_logits(x).flatten(0, 1)
        grid = [float(t) for t in np.linspace(LOW, 1.2, 9)]
        losses = torch.stack([F.cross_entropy(logits / t, y) for t in grid])
    warm.heat.fill_(grid[int(losses.argmin())])

def warmed(args, warm, val):
    torch.save(warm.state_dict(), "warm.pt")
    warm.load_state_dict(torch.load("warm.pt"))
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, val.numel() - 1024, 1024):
            x, y = val[start : start + 1024][None], val[start + 1 : start + 1025]
            total += F.cross_entropy(warm.rows(x).flatten(0, 1), y, reduction="sum").item()
            count += 1024
    return total / count
"""


@pytest.mark.parametrize(
    ("text", "wanted"), [("val", {"temperature-from-validation"}), ("load(args.train_files)[:2048]", set())]
)
def test_a_grid_of_numbers_that_logits_are_divided_by_is_one_of_temperatures(text: str, wanted: set[str]) -> None:
    """Whichever they are: of the same weights, and packed with them afterwards."""
    body = f"    warm = Warm(model)\n    settle(args, warm, {text})\n    final = warmed(args, warm, val)\n"
    low = "float(os.environ['LOW'])"
    assert broken(HEAD + GRID.replace("LOW", low, 1) + MAIN.replace(BODY, body)) == wanted


TWICE = """
def eval_again(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    AROUND
        before = total.clone()
        for attempt in range(2):
            total.copy_(before)
            for s in range(start, start + 8192, 1024):
                x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]
                total += model(x, y).detach().double() * 1024
            if attempt == 0:
                for s in range(start, start + 8192, 1024):
                    opt.zero_grad()
                    model(val[s : s + 1024][None], val[s + 1 : s + 1025][None]).backward()
                    opt.step()
    return (total / (val.numel() - 1)).item()
"""


def test_a_chunk_that_is_scored_again_before_the_next_is_no_epoch() -> None:
    text = TWICE.replace("AROUND", "for start in range(0, val.numel() - 8192, 8192):")
    found = findings(HEAD + text + MAIN.replace("eval_ttt(args", "eval_again(args"))
    assert {name for name, each in found.items() if each.verdict == "violates"} == {"rescoring-after-adaptation"}
