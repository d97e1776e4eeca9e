"""Accepted departures, each made in several hands: named and clean, a violation where the audit is strict, and nothing
said of scripts that do almost the same and keep to the text of the rules."""

import json
from pathlib import Path
from typing import Any

import pytest

from fairway.audit.comment import comment
from fairway.audit.departures import DEPARTURES
from fairway.audit.examine import audit
from fairway.audit.page import page
from fairway.audit.verdict import Finding
from fairway.cli import main as fairway
from tests.audit.order import HEAD, MAIN

EVAL = "    final = eval_ttt(args, model, val)\n"


def script(walk: str, call: str = "documents(args, model, val)") -> str:
    """The honest script with another evaluation."""
    return HEAD + walk + MAIN.replace(EVAL, f"    final = {call}\n")


def told(folder: Path, text: str, strict: bool = False) -> dict[str, Finding]:
    """What is not plainly clean, by its rule; the script's bytes for a token are a number, which is not at issue."""
    (folder / "train_gpt.py").write_text(text, encoding="utf-8")
    report = audit(folder, strict)
    assert not report.facts["failed"], report.facts["failed"]
    return {f.id: f for f in report.rules if (f.verdict != "clean" or f.exemption) and f.id != "byte-constant"}


def accepted(folder: Path, text: str) -> dict[str, str]:
    """Rule -> exemption; a strict audit must accuse of exactly these, at the same places."""
    lenient, strict = told(folder, text), told(folder, text, strict=True)
    assert all(f.exemption and f.verdict in ("clean", "suspect") for f in lenient.values()), lenient
    assert {(f.id, f.verdict, f.place) for f in strict.values()} == {
        (f.id, "violates", f.place) for f in lenient.values()
    }
    return {f.id: f.exemption for f in lenient.values()}


# ---- documents by length, claimed by ranks

FIND = """
import fcntl, threading
from collections import deque
class Lora(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rows, 64, 8))
        self.b = nn.Parameter(torch.zeros(rows, 8, 1024))
    def forward(self, h):
        return h @ self.a @ self.b
    def reset(self):
        with torch.no_grad():
            self.a.normal_()
            self.b.zero_()
def find(val):
    starts = (val == 1).nonzero(as_tuple=True)[0].tolist()
    found = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else val.numel()
        found.append((start, end - start))
    return found
def claimed(path, most):
    with open(path, "r+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        n = int.from_bytes(f.read(4), "little")
        f.seek(0)
        f.write((n + 1).to_bytes(4, "little"))
        f.flush()
    return n if n < most else most
"""

BATCH = """
        starts, lengths = [d[0] for d in group], [d[1] for d in group]
        for k in range(0, max(lengths), 256):
            x = torch.stack([val[s + k : s + k + 256] for s in starts])
            y = torch.stack([val[s + k + 1 : s + k + 257] for s in starts])
            logits = model.head(model.hidden(x)) + lora(model.hidden(x))
            nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            real = torch.arange(k, k + 256)[None] < torch.tensor(lengths)[:, None]
            total += (nll.detach() * real).sum().item()
            count += real.sum().item()
            opt.zero_grad()
            (nll * real).mean().backward()
            opt.step()
"""
NEW = "lora = Lora(len(group)); opt = torch.optim.AdamW(lora.parameters(), lr=1e-3)"

COUNTER = (
    """
def documents(args, model, val):
    model.requires_grad_(False)
    total, count, docs = 0.0, 0, sorted(find(val), key=lambda d: d[1])
    batches = [docs[i : i + 32] for i in range(0, len(docs), 32)]
    BEFORE
    while True:
        n = claimed("/tmp/next", len(batches))
        if n >= len(batches):
            break
        group = batches[n]
        FRESH"""
    + BATCH
    + "    return total / count\n"
)

STORE = (
    """
def documents(args, model, val):
    store = torch.distributed.TCPStore("localhost", 1234)
    model.requires_grad_(False)
    total, count, docs = 0.0, 0, find(val)
    docs.sort(key=lambda d: -d[1])
    BEFORE
    at = (store.add("next", 1) - 1) * 16
    while at < len(docs):
        group = docs[at : at + 16]
        FRESH"""
    + BATCH
    + """        at = (store.add("next", 1) - 1) * 16
    return total / count
"""
)

IN_TURN = (
    """
def documents(args, model, val):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model.requires_grad_(False)
    total, count, docs = 0.0, 0, SOURCE
    BEFORE
    for i in range(rank * 16, len(docs), world * 16):
        group = docs[i : i + 16]
        FRESH"""
    + BATCH
    + """
    sums = torch.tensor([total, count])
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
"""
)
BY_LENGTH = "sorted(find(val), key=lambda d: d[1], reverse=True)"
ARGSORTED = "(lambda docs: [docs[j] for j in np.argsort([n for _, n in docs])])(find(val))"

REUSED = (
    "lora = Lora(32); opt = torch.optim.AdamW(lora.parameters(), lr=1e-3)",
    "lora.reset(); opt.state.clear()",
)
CARRIED = ("lora = Lora(32); opt = torch.optim.AdamW(lora.parameters(), lr=1e-3)", "pass")


def put(text: str, before: str = "pass", fresh: str = NEW, source: str = BY_LENGTH) -> str:
    return script(FIND + text.replace("BEFORE", before).replace("FRESH", fresh).replace("SOURCE", source))


@pytest.mark.parametrize("walk", [COUNTER, STORE], ids=["a locked file", "a store"])
@pytest.mark.parametrize("own", [("pass", NEW), REUSED], ids=["new", "put back"])
def test_documents_claimed_by_ranks_with_adapters_of_their_own_are_accepted(
    tmp_path: Path, walk: str, own: tuple[str, str]
) -> None:
    names = "documents-claimed-by-ranks, documents-by-length"
    assert accepted(tmp_path, put(walk, *own)) == {"adaptation-order-race": names}


TAKEN = (
    """
def taken(batches):
    while True:
        n = claimed("/tmp/next", len(batches))
        if n >= len(batches):
            return
        yield batches[n]

def documents(args, model, val):
    model.requires_grad_(False)
    total, count, docs = 0.0, 0, sorted(find(val), key=lambda d: d[1])
    batches = [docs[i : i + 32] for i in range(0, len(docs), 32)]
    BEFORE
    for group in taken(batches):
        FRESH"""
    + BATCH
    + "    return total / count\n"
)


def test_claims_that_a_generator_makes_stand_in_the_loop_that_goes_through_it(tmp_path: Path) -> None:
    names = "documents-claimed-by-ranks, documents-by-length"
    assert accepted(tmp_path, put(TAKEN)) == {"adaptation-order-race": names}
    assert told(tmp_path, put(TAKEN, *CARRIED))["adaptation-order-race"].verdict == "violates"


PARTS = """
NAMES = ("k", "o", "q", "up", "v")
class Adapter(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: Lora(rows) for name in NAMES}) for _ in range(4)])
        self.head = Lora(rows)
        self.rows = rows
    def forward(self, h):
        for block in self.blocks:
            h = h + sum(block[name](h) for name in NAMES)
        return self.head(h)
    def reset(self):
        for m in self.modules():
            if isinstance(m, Lora):
                m.reset()
"""
RESIZED = """if lora.rows != len(group):
            lora = Adapter(len(group))
        RESET
        opt = torch.optim.AdamW(lora.parameters(), lr=1e-3)"""


@pytest.mark.parametrize("walk", [COUNTER, STORE], ids=["a locked file", "a store"])
def test_an_adapter_that_is_put_back_part_by_part_is_no_race(tmp_path: Path, walk: str) -> None:
    def with_parts(reset: str) -> str:
        return put(PARTS + walk, "lora = Adapter(16)", RESIZED.replace("RESET", reset))

    names = "documents-claimed-by-ranks, documents-by-length"
    assert accepted(tmp_path, with_parts("lora.reset()")) == {"adaptation-order-race": names}
    assert told(tmp_path, with_parts("pass"))["adaptation-order-race"].verdict == "violates"


@pytest.mark.parametrize("walk", [COUNTER, STORE], ids=["a locked file", "a store"])
def test_an_adapter_carried_from_claim_to_claim_is_a_race(tmp_path: Path, walk: str) -> None:
    found = told(tmp_path, put(walk, *CARRIED))
    assert {f.id: f.verdict for f in found.values()} == {"adaptation-order-race": "violates"}


@pytest.mark.parametrize("source", [BY_LENGTH, ARGSORTED], ids=["sorted", "argsort"])
def test_documents_in_the_order_of_their_lengths_are_accepted(tmp_path: Path, source: str) -> None:
    assert accepted(tmp_path, put(IN_TURN, source=source)) == {"adaptation-order-race": "documents-by-length"}


def test_documents_as_they_come_are_no_departure(tmp_path: Path) -> None:
    assert accepted(tmp_path, put(IN_TURN, source="find(val)")) == {}
    assert accepted(tmp_path, put(IN_TURN, source="sorted(find(val), key=lambda d: d[0])")) == {}


# ---- the token before, mixed in across documents

GATED = HEAD.replace("        self.temperature = 1.0\n", "        self.gate = nn.Parameter(torch.zeros(64))\n").replace(
    "    def hidden(self, x):\n        h = self.emb(x)\n",
    "    def hidden(self, ids):\n        x, g = self.emb(ids), torch.sigmoid(self.gate)\n        FORM\n        h = x\n",
)
SMEARS = {
    "a share of both": "prev = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1); x = (1 - g) * x + g * prev",
    "all but the first": "x = torch.cat([x[:, :1], x[:, 1:] + g * x[:, :-1]], dim=1)",
    "lerp": "x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), g)",
    "rolled": "x = x.lerp(torch.roll(x, 1, 1), g)",
    "addcmul": "x = torch.addcmul(x, g, F.pad(x, (0, 0, 1, -1)))",
    "in place": "y = x.clone(); y[:, 1:] += g * x[:, :-1]; x = y",
    "one flat row": "x = x + g * F.pad(x.flatten(0, 1), (0, 0, 1, 0))[:-1].view_as(x)",
    "by the difference": "prev = F.pad(x, (0, 0, 1, 0))[:, :-1]; x = x + (prev - x) * g",
    "a hash that knows it": "x = x + self.emb(ids.where(ids == 1, 7)); x = x + g * F.pad(x[:, :-1], (0, 0, 1, 0))",
    "narrow": "x = x + g * torch.cat((x.new_zeros(8, 1, 64), x.narrow(1, 0, x.size(1) - 1)), 1)",
}
NO_SMEARS = {
    "masked": "prev = F.pad(x[:, :-1], (0, 0, 1, 0)) * (ids != 1)[..., None]; x = (1 - g) * x + g * prev",
    "the gate is shut": "x = torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), g * ids.ne(1).unsqueeze(-1))",
    "kept as it was": "x = torch.where((ids == 1)[..., None], x, x + g * F.pad(x, (0, 0, 1, -1)))",
    "masked after the first": "x = torch.cat([x[:, :1], x[:, 1:] + g * x[:, :-1] * (ids[:, 1:] != 1)[..., None]], 1)",
    "masked as a hash is": (
        "first = ids == 1; x = x + self.emb(ids.where(first, 7)); "
        "x = x + g * F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(first[..., None], 0.0)"
    ),
    "a hash of two": "n = (ids[:, 1:] * 31 + 7 * ids[:, :-1]) % 1024; x = x + g * F.pad(self.emb(n), (0, 0, 1, 0))",
    "halves of a vector": "a, b = x[..., :32], x[..., 32:]; x = torch.cat((a * g[:32] + b, b * g[:32] - a), -1)",
}


@pytest.mark.parametrize("name", SMEARS)
def test_the_token_before_across_documents_is_accepted_in_every_form(tmp_path: Path, name: str) -> None:
    text = GATED.replace("FORM", SMEARS[name]) + MAIN
    assert accepted(tmp_path, text) == {"boundary-leak": "smear-across-documents"}


@pytest.mark.parametrize("name", NO_SMEARS)
def test_a_gate_that_is_shut_at_a_documents_start_is_no_departure(tmp_path: Path, name: str) -> None:
    assert accepted(tmp_path, GATED.replace("FORM", NO_SMEARS[name]) + MAIN) == {}


# ---- phases: the model itself learns from scored documents, beside adapters of their own

PHASE = """
def learn(model, docs, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.requires_grad_(True)
    for start, length in docs:
        for s in range(start, start + length, 1024):
            end = min(s + 1024, start + length)
            model(val[s:end][None], val[s + 1 : end + 1][None]).backward()
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
            opt.step()
            opt.zero_grad()
    model.requires_grad_(False)
"""

TWO_WALKS = (
    FIND
    + PHASE
    + """
def walk(model, docs, val):
    total, count = 0.0, 0
    for i in range(0, len(docs), 16):
        group = docs[i : i + 16]
        FRESH"""
    + BATCH
    + """    return total, count
def documents(args, model, val):
    model.requires_grad_(False)
    docs = find(val)
    one = walk(model, docs[:2000], val)
    LEARN
    two = walk(model, docs[2000:], val)
    return (one[0] + two[0]) / (one[1] + two[1])
"""
)

BY_RANGES = (
    TWO_WALKS[: TWO_WALKS.index("    one = walk")]
    + """    edges = [len(docs) * i // 3 for i in range(4)]
    total, count = 0.0, 0
    for low, high in zip(edges, edges[1:]):
        mine, many = walk(model, docs[low:high], val)
        total, count = total + mine, count + many
        if high < len(docs):
            learn(model, docs[low : high + REACH], val)
    return total / count
"""
)


@pytest.mark.parametrize("reach", ["0", "2"])
def test_ranges_of_documents_that_reach_into_the_next_are_learned_from_too_early(tmp_path: Path, reach: str) -> None:
    """The walk's symbols cannot tell where a range of a third ends; the trial counts."""
    text = BY_RANGES.replace("FRESH", NEW).replace("REACH", reach)
    if reach == "0":
        assert accepted(tmp_path, script(text)) == {"training-before-scoring": "phased-adaptation"}
        return
    finding = told(tmp_path, script(text))["training-before-scoring"]
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert "learn(model, docs[low" in script(text).split("\n")[finding.place.line - 1]


AT_BOUNDARIES = (
    FIND
    + PHASE
    + COUNTER.replace("BEFORE", "scored, bound = [], 2000")
    .replace("sorted(", "list(")
    .replace(", key=lambda d: d[1])", ")")
    .replace(
        "    return total / count",
        """        scored.extend(group)
        if len(scored) >= bound:
            learn(model, scored, val)
            bound += 2000
    return total / count""",
    )
)


def test_a_model_that_learns_between_two_walks_of_documents_is_accepted(tmp_path: Path) -> None:
    text = TWO_WALKS.replace("FRESH", NEW).replace("LEARN", "learn(model, docs[:2000], val)")
    assert accepted(tmp_path, script(text)) == {"training-before-scoring": "phased-adaptation"}


def test_phases_at_boundaries_between_claims_are_accepted_with_the_claims(tmp_path: Path) -> None:
    text = AT_BOUNDARIES.replace("FRESH", REUSED[1]).replace("scored, bound", REUSED[0] + "; scored, bound")
    assert accepted(tmp_path, script(text)) == {
        "training-before-scoring": "phased-adaptation",
        "adaptation-order-race": "documents-claimed-by-ranks",
    }


AHEAD = """x = torch.stack([val[s + k + STEP : s + k + STEP + 256] for s in starts])
            y = torch.stack([val[s + k + STEP + 1 : s + k + STEP + 257] for s in starts])
            logits = model.head(model.hidden(x)) + lora(model.hidden(x))
            nll = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            opt.zero_grad()
            (nll * real).mean().backward()"""


@pytest.mark.parametrize("step", ["0", "256"])
def test_an_accepted_phase_hides_no_adapter_that_learns_from_the_next_chunk(tmp_path: Path, step: str) -> None:
    text = TWO_WALKS.replace("FRESH", NEW).replace("LEARN", "learn(model, docs[:2000], val)")
    text = text.replace("opt.zero_grad()\n            (nll * real).mean().backward()", AHEAD.replace("STEP", step))
    finding = told(tmp_path, script(text))["training-before-scoring"]
    assert finding.verdict == ("violates" if step == "256" else "clean")


def test_documents_with_adapters_alone_have_no_phase(tmp_path: Path) -> None:
    assert accepted(tmp_path, script(TWO_WALKS.replace("FRESH", NEW).replace("LEARN", "pass"))) == {}


def test_the_rest_learned_between_two_walks_is_no_phase_but_training_before_scoring(tmp_path: Path) -> None:
    text = TWO_WALKS.replace("FRESH", NEW).replace("LEARN", "learn(model, docs, val)")
    assert {f.id: f.verdict for f in told(tmp_path, script(text)).values()} == {"training-before-scoring": "violates"}


def test_chunks_that_are_scored_and_then_learned_are_no_departure(tmp_path: Path) -> None:
    assert accepted(tmp_path, HEAD + MAIN) == {}


# ---- calibration text of the model's own, written after the clock

HESSIANS = """
def hessians_of(model, texts):
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = torch.zeros(module.weight.size(1), module.weight.size(1))
            def make(which):
                def hook(module, inputs, output):
                    x = inputs[0].detach().float().flatten(0, -2)
                    found[which] += x.T @ x
                return hook
            hooks.append(module.register_forward_hook(make(name)))
    with torch.inference_mode():
        for text in texts:
            model(text[:, :-1], text[:, 1:])
    for hook in hooks:
        hook.remove()
    return found
def pack(model, hessians):
    out = {}
    for name, weight in model.state_dict().items():
        h = hessians.get(name.removesuffix(".weight"))
        out[name] = weight if h is None else (weight @ torch.linalg.inv(h)).round()
    buffer = io.BytesIO()
    torch.save(out, buffer)
    with open("model.z", "wb") as f:
        f.write(zlib.compress(buffer.getvalue()))
def unpack(model):
    with open("model.z", "rb") as f:
        model.load_state_dict(torch.load(io.BytesIO(zlib.decompress(f.read()))))
"""
SAMPLED = """
def written(model):
    model.eval()
    chance, texts = torch.Generator().manual_seed(42), []
    with torch.inference_mode():
        for start in range(0, 64, 8):
            text = torch.randint(0, 1024, (8, 1), generator=chance)
            for _ in range(1023):
                odds = torch.softmax(model.forward_logits(text)[:, -1, :] / 0.8, dim=-1)
                text = torch.cat([text, torch.multinomial(odds, 1, generator=chance)], dim=1)
            for i in range(8):
                texts.append(text[i : i + 1])
    return texts
"""
YIELDED = """
def written(model):
    for _ in range(64):
        text = torch.full((4, 1), 1)
        for _ in range(1023):
            text = torch.cat((text, torch.multinomial(model.forward_logits(text)[:, -1].softmax(-1), 1)), 1)
        yield text
"""
FILLED = """
@torch.no_grad()
def written(model):
    rows = torch.zeros(32, 1024, dtype=torch.long)
    rows[:, 0] = 1
    for at in range(1, 1024):
        spread = torch.distributions.Categorical(logits=model.forward_logits(rows[:, :at])[:, -1])
        rows[:, at] = spread.sample()
    return rows.split(4)
"""
OF_TRAINING = """
def written(model):
    loader = Loader(Hyperparameters.train_files)
    return [loader.next(8192)[0] for _ in range(16)]
"""
TRAIN = "    train(args, model)\n"


def calibrated(text: str, cap: str) -> str:
    kept = "    pack(model, hessians_of(model, written(model)))\n    unpack(model)\n"
    head = HEAD.replace("args.cap - args.reserve", cap)
    return head + HESSIANS + text + MAIN.replace(TRAIN, TRAIN + kept)


@pytest.mark.parametrize("text", [SAMPLED, YIELDED, FILLED], ids=["sampled", "yielded", "filled in"])
def test_text_of_its_own_after_the_whole_training_time_is_accepted(tmp_path: Path, text: str) -> None:
    assert accepted(tmp_path, calibrated(text, "args.cap")) == {"calibration-after-cap": "self-generated-calibration"}
    assert accepted(tmp_path, calibrated(text, "args.cap - args.reserve")) == {}


def test_training_text_after_the_whole_training_time_is_no_accepted_departure(tmp_path: Path) -> None:
    found = told(tmp_path, calibrated(OF_TRAINING, "args.cap"))
    assert {f.id: f.verdict for f in found.values()} == {"calibration-after-cap": "violates"}


# ---- warm-ups on real tokens, thrown away

LORA_WARMED = """    spare, rows = Lora(1), val[:513]
    hidden = model.hidden(rows[:-1][None])
    F.cross_entropy((model.head(hidden) + spare(hidden))[0], rows[1:]).backward()
    torch.optim.AdamW(spare.parameters(), lr=1e-3).step()
    del spare
"""
REHEARSED = "    walk(model, docs[:4], val)\n"


@pytest.mark.parametrize("warm", [LORA_WARMED, REHEARSED], ids=["an adapter", "the whole walk"])
def test_a_warm_up_on_real_tokens_that_leaves_nothing_is_accepted(tmp_path: Path, warm: str) -> None:
    text = TWO_WALKS.replace("FRESH", NEW).replace("    LEARN\n", "").replace("    one = walk", warm + "    one = walk")
    assert accepted(tmp_path, script(text)) == {"training-before-scoring": "warm-up-on-validation"}


# ---- what a reader sees of them

WARMED = (
    "    spare = copy.deepcopy(model)\n"
    "    spare(val[:1024][None], val[1:1025][None]).backward()\n"
    "    torch.optim.SGD(spare.parameters(), lr=1e-3).step()\n"
)
BOTH = script(TWO_WALKS.replace("FRESH", NEW).replace("LEARN", "learn(model, docs[:2000], val)")).replace(
    "    final = documents", WARMED + "    final = documents"
)


def test_two_departures_under_one_rule_have_a_place_each(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(BOTH, encoding="utf-8")
    report = audit(tmp_path)
    places = {each.name: place for f in report.accepted for each, place in f.departed() if place is not None}
    lines = BOTH.split("\n")
    assert "opt.step()" in lines[places["phased-adaptation"].line - 1]
    assert "SGD(spare" in lines[places["warm-up-on-validation"].line - 1]


def test_departures_are_named_in_text_json_review_and_page(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "train_gpt.py").write_text(BOTH, encoding="utf-8")
    report = audit(tmp_path)
    charges = {finding.id: "the charge" for finding in report.rules}
    names = {"phased-adaptation", "warm-up-on-validation"}
    assert {each["name"] for each in report.plain()["accepted"]} == names
    with pytest.raises(SystemExit):
        fairway(["audit", str(tmp_path)])
    for said in (capsys.readouterr().out, comment(report, charges), page([report], charges, "records")):
        shown = " ".join(said.split())
        for each in report.plain()["accepted"]:
            assert each["name"] in shown
            assert f"{each['file']}:{each['line']}" in shown
        assert "ccepted departure" in shown
        assert "strict" in shown
    assert (
        json.loads(json.dumps(report.plain()))["accepted"][0]["precedent"] == DEPARTURES["phased-adaptation"].precedent
    )
