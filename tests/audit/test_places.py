"""Where a fault is named: the line that decides it, which is often not the line in which it shows."""

import re
import warnings
from pathlib import Path

import pytest

from fairway.audit.passes.reserves import set_to
from fairway.audit.rules import training_over_time
from fairway.audit.trial.planning import Plans
from fairway.audit.verdict import Finding
from tests.audit.order import HEAD, HONEST, MAIN, broken, case_of, findings, line_of
from tests.audit.small import TABLE, script, verdict
from tests.audit.test_rules_trials import DEALT
from tests.audit.test_rules_trials import HEAD as SMALL

BODY = "    final = eval_ttt(args, model, val)\n"
CALIBRATED = """
def moments(args, model, tokens):
    sums = torch.zeros(64, 64)
    for s in range(0, 65536, 1024):
        h = model.hidden(tokens[s : s + 1024][None])
        sums += (h.transpose(1, 2) @ h)[0].detach()
    return sums

def round_off(model, sums):
    for p in model.parameters():
        p.data.copy_((p / sums.diagonal().mean()).round() * sums.diagonal().mean())

def collect(args, model):
    SOURCE
    return moments(args, model, tokens)
"""


def line(finding: Finding) -> int:
    assert finding.verdict == "violates"
    assert finding.place is not None
    return finding.place.line


def calibrated(source: str, head: str = HEAD) -> str:
    body = "    round_off(model, collect(args, model))\n    final = eval_val(args, model, val)\n"
    return head + CALIBRATED.replace("SOURCE", source) + MAIN.replace(BODY, body)


RESERVED = '"RESERVE", 0.0'
RESERVES = {
    "in the comparison": ("elapsed >= args.cap - args.reserve", ""),
    "in milliseconds": ("1000 * elapsed >= 1000 * args.cap - 1000 * args.reserve", ""),
    "of two names": ("elapsed >= limit", "    kept = args.reserve\n    limit = args.cap - kept\n"),
    "taken off": ("elapsed >= limit", "    limit = args.cap\n    limit -= args.reserve\n"),
}


@pytest.mark.parametrize("way", RESERVES)
def test_where_a_reserve_is_nothing_the_call_that_collects_is_named_and_the_setting_told(way: str) -> None:
    """Reviewers point at the deed: of seven cases of seven authors, none at the setting."""
    test, before = RESERVES[way]
    head = HEAD.replace("elapsed >= args.cap - args.reserve", test).replace('"RESERVE", 12.0', '"RESERVE", 0.0')
    head = head.replace("def train(args, model):\n", f"def train(args, model):\n{before}")
    text = calibrated("tokens = load(args.train_files)", head)
    found = findings(text)["calibration-after-cap"]
    assert line(found) == line_of(text, "return moments(args, model, tokens)")
    assert f":{line_of(text, RESERVED)} keeps nothing back" in found.evidence


PACKED = """
def pack(args, model):
    total = sum(p.numel() for p in model.parameters())
    found = collect(args, model)
    round_off(model, found)
    return total
"""


def test_of_what_packs_the_weights_the_call_that_collects_is_named() -> None:
    head = HEAD.replace("elapsed >= args.cap - args.reserve", "elapsed >= args.cap")
    text = calibrated("tokens = load(args.train_files)", head)
    text = text.replace("    round_off(model, collect(args, model))\n", "    pack(args, model)\n")
    text = text.replace("\ndef main(", f"{PACKED}\ndef main(", 1)
    assert line(findings(text)["calibration-after-cap"]) == line_of(text, "return moments(args, model, tokens)")


def test_a_look_at_the_score_before_is_not_what_the_weights_are_calibrated_on() -> None:
    """The text is handed in, which is the line to look at, and scored as well before the weights are rounded."""
    body = "    found = collect(args, model, val)\n    before = eval_val(args, model, val)\n    print(before)\n"
    body += "    round_off(model, found)\n    final = eval_val(args, model, val)\n"
    collect = CALIBRATED.replace("    SOURCE\n", "").replace(
        "def collect(args, model)", "def collect(args, model, tokens)"
    )
    text = HEAD + collect + MAIN.replace(BODY, body)
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "found = collect(args, model, val)")


def test_without_a_reserve_the_calibration_is_named() -> None:
    head = HEAD.replace("elapsed >= args.cap - args.reserve", "elapsed >= args.cap")
    text = calibrated("tokens = load(args.train_files)", head)
    assert line(findings(text)["calibration-after-cap"]) == line_of(text, "return moments(args, model, tokens)")


def test_calibration_on_validation_is_named_where_its_text_is_asked_for() -> None:
    text = calibrated("tokens = load(args.val_files)")
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "    tokens = load(args.val_files)")


@pytest.mark.parametrize("program", ["run", "check_call"])
@pytest.mark.parametrize(("files", "wanted"), [("val_files", "violates"), ("train_files", "clean")])
def test_what_a_program_packs_is_what_the_script_wrote(program: str, files: str, wanted: str) -> None:
    """Two programs: one makes the file that is handed in, the other what the model is read from."""
    head = HEAD.replace("import copy", "import subprocess\nimport copy", 1)
    text = calibrated(f"tokens = load(args.{files})", head)
    packed = f"""    torch.save(model.state_dict(), "weights.raw")
    subprocess.{program}(["lrzip", "-q", "-o", "weights.lrz", "weights.raw"])
    subprocess.{program}(["lrzip", "-q", "-d", "-o", "back.raw", "weights.lrz"])
    model = GPT()
    model.load_state_dict(torch.load("back.raw"))
    final ="""
    text = text.replace("    final =", packed, 1)
    assert findings(text)["calibration-on-validation"].verdict == wanted


def test_calibration_on_validation_is_named_where_its_files_are_handed_over() -> None:
    """The function that reads them is told which."""
    text = calibrated("tokens = load(files)").replace("def collect(args, model)", "def collect(args, model, files)")
    text = text.replace("collect(args, model)", "collect(args, model, args.val_files)")
    assert "def collect(args, model, files)" in text
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "collect(args, model, args.val_files)")


PREPARED = """
class Lazy:
    def __init__(self, pattern):
        self.files, self.at = sorted(glob.glob(pattern)), 0
        self.sizes = [int(np.fromfile(path, dtype="<i4", count=256)[2]) for path in self.files]

    def next(self, n):
        kept = np.memmap(self.files[0], dtype="<u2", mode="r", offset=1024)
        part = torch.from_numpy(kept[self.at : self.at + n + 1].astype(np.int64))
        self.at += n
        return part[:-1].view(-1, 1024), part[1:].view(-1, 1024)

def gathered(args, model, loader):
    total = torch.zeros(64)
    with torch.no_grad():
        for _ in range(4):
            x, _ = loader.next(65536)
            total += model.hidden(x).square().mean((0, 1))
    return total

def prepared(args, model):
    calib = Lazy(args.val_files)
    return gathered(args, model, calib)
"""


def test_a_loader_that_reads_on_in_another_call_is_named_where_it_is_made() -> None:
    """Its first file is looked at where it is made, and the batches come out of it elsewhere."""
    body = "    round_off(model, prepared(args, model))\n    final = eval_val(args, model, val)\n"
    head = HEAD + CALIBRATED[: CALIBRATED.index("def collect")] + PREPARED
    text = head + MAIN.replace(BODY, body)
    found = findings(text)["calibration-on-validation"]
    assert found.verdict == "violates"
    assert line(found) == line_of(text, "calib = Lazy(args.val_files)")
    assert "calibration-on-validation" not in broken(text.replace("Lazy(args.val_files)", "Lazy(args.train_files)"))


def test_a_loader_that_reads_nothing_until_it_is_gone_through_is_named_where_it_is_made() -> None:
    """The training makes one of the same class, whose lines read its files as well."""
    lazy = PREPARED.replace("    self.sizes = [int(np.fromfile", "    # self.sizes = [int(np.fromfile")
    lazy = lazy.replace("self.files, self.at = sorted(glob.glob(pattern)), 0", "self.files, self.at = [pattern], 0")
    lazy = lazy.replace("np.memmap(self.files[0],", "np.memmap(sorted(glob.glob(self.files[0]))[0],")
    body = "    round_off(model, prepared(args, model))\n    final = eval_val(args, model, val)\n"
    text = HEAD + CALIBRATED[: CALIBRATED.index("def collect")] + lazy + MAIN.replace(BODY, body)
    text = text.replace(
        "round_off(model, prep", "gathered(args, model, Lazy(args.train_files))\n    round_off(model, prep"
    )
    text = text.replace(
        "calib = Lazy(args.val_files)", "own = args.val_files\n    calib = Lazy(own)\n    more = 4\n" * 1
    )
    found = findings(text)["calibration-on-validation"]
    assert line(found) == line_of(text, "calib = Lazy(own)")


def test_a_literal_that_asks_for_validation_files_is_named() -> None:
    text = calibrated("tokens = load(files)").replace("def collect(args, model)", "def collect(args, model, files)")
    text = text.replace("collect(args, model)", 'collect(args, model, listed("val"))')
    text = text.replace("def collect(", 'def listed(kind):\n    return f"./data/shards_{kind}_*.bin"\n\ndef collect(')
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, 'listed("val"))')


def test_the_line_that_hands_over_what_the_evaluation_has_read_is_named() -> None:
    """By the name that whoever asked for it gave it; the helper goes through it by another, in a loop of its own."""
    text = calibrated("pass").replace("def collect(args, model):", "def collect(args, model, tokens):")
    text = text.replace("collect(args, model))", "collect(args, model, val[: 1 << 16]))")
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "collect(args, model, val[: 1 << 16])")


FITTED = """
def fit(args, model, val):
    scale = torch.ones((), requires_grad=True)
    opt = torch.optim.SGD([scale], lr=0.1)
    for s in range(0, 65536, 1024):
        logits = model.forward_logits(val[s : s + 1024][None])[0].detach()
        opt.zero_grad()
        F.cross_entropy(logits * scale, val[s + 1 : s + 1025]).backward()
        opt.step()
    return scale.detach()

def scaled(args, model, val, scale):
    total, count = 0.0, 0
    with torch.no_grad():
        for s in range(0, val.numel() - 1024, 1024):
            logits = model.forward_logits(val[s : s + 1024][None])[0] * scale
            total += F.cross_entropy(logits, val[s + 1 : s + 1025], reduction="sum").item()
            count += 1024
    return total / count
"""


def test_a_temperature_is_named_where_its_fit_is_called() -> None:
    body = "    scale = fit(args, model, val)\n    final = scaled(args, model, val, scale)\n"
    text = HEAD + FITTED + MAIN.replace(BODY, body)
    assert line(findings(text)["temperature-from-validation"]) == line_of(text, "scale = fit(")


BY_STEPS = """for step in range((reach - start) // args.seq_len):
                    s = min(start + step * args.seq_len, reach)"""


@pytest.mark.parametrize("steps", ["for s in range(start, reach, args.seq_len):", BY_STEPS])
@pytest.mark.parametrize(
    "reach", ["end + 1 * args.chunk", "start + 2 * args.chunk", "(ci + 1) * args.chunk + args.seq_len"]
)
def test_a_step_that_reaches_too_far_is_named_where_it_is_told_how_far(reach: str, steps: str) -> None:
    """And not where its loop begins, nor where it is taken, nor where a loop over steps says how far each goes."""
    loop = "            for _epoch in range(args.epochs):\n"
    told = f"            reach = min({reach}, val.numel() - 1)\n"
    text = HONEST.replace(loop, told + loop).replace("for s in range(start, end, args.seq_len):", steps)
    assert line(findings(text)["training-before-scoring"]) == line_of(text, "reach = min(")


TOLD = """
def adapt(args, model, opt, val, lo, hi):
    for s in list(range(lo, hi, args.seq_len)):
        e = min(s + args.seq_len, hi)
        opt.zero_grad()
        model(val[s:e][None], val[s + 1 : e + 1][None]).backward()
        opt.step()

"""


def test_a_call_that_adds_to_where_a_chunk_ends_is_named() -> None:
    """And not the range in the function that is told so."""
    loop = "            for _epoch in range(args.epochs):\n"
    begin = HONEST.index(loop)
    body = HONEST[begin : HONEST.index("    return (total / count).item()\n", begin)]
    call = "            adapt(args, model, opt, val, start, end + args.seq_len)\n"
    text = HONEST.replace(body, call).replace("def eval_ttt(", f"{TOLD}\ndef eval_ttt(")
    assert line(findings(text)["training-before-scoring"]) == line_of(text, "end + args.seq_len)")


SPAN = """
def span_of(args, ci, total):
    end = (ci + 1) * args.chunk
    return ci * args.chunk, min(end + args.chunk // 2, total)
"""


def test_a_helper_that_says_how_far_a_step_reaches_is_named() -> None:
    loop = "            for _epoch in range(args.epochs):\n"
    step = "                for s in range(start, end, args.seq_len):\n"
    call = "            adapt(args, model, opt, val, *span_of(args, ci, val.numel() - 1))\n"
    begin = HONEST.index(loop)
    body = HONEST[begin : HONEST.index("    return (total / count).item()\n", begin)]
    own = body.replace(step, step.replace("(start, end,", "(lo, hi,")).replace("            for", "    for", 1)
    lines = [each[8:] if n else each for n, each in enumerate(own.splitlines(keepends=True))]
    helper = f"{SPAN}\ndef adapt(args, model, opt, val, lo, hi):\n" + "".join(lines)
    text = HONEST.replace(body, call).replace("def eval_ttt(", f"{helper}\ndef eval_ttt(")
    assert line(findings(text)["training-before-scoring"]) == line_of(text, "min(end + args.chunk // 2")


def test_what_each_rank_begins_with_is_no_reach() -> None:
    """Half of the next chunk is learned from, by ranks in turn: the call is at fault."""
    loop = "            for _epoch in range(args.epochs):\n"
    begin = HONEST.index(loop)
    body = HONEST[begin : HONEST.index("    return (total / count).item()\n", begin)]
    helper = """
def adapt(args, model, opt, val, first, rank=0):
    for step in range(args.chunk // args.seq_len):
        lo = min(step * args.seq_len + rank * args.seq_len, args.chunk)
        x = val[first + lo : first + lo + args.seq_len][None]
        y = val[first + lo + 1 : first + lo + args.seq_len + 1][None]
        opt.zero_grad()
        model(x, y).backward()
        opt.step()
"""
    call = "adapt(args, model, opt, val, ci * args.chunk + args.chunk // 2)"
    text = HONEST.replace(body, f"            {call}\n")
    text = text.replace("def eval_ttt(", f"{helper}\ndef eval_ttt(")
    assert line(findings(text)["training-before-scoring"]) == line_of(text, call)


WHOLE = """
def polish(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-4)
    for s in range(0, val.numel() - args.seq_len, args.seq_len):
        loss = model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None])
        opt.zero_grad()
        loss.backward()
        opt.step()

def whole(args, model, val):
    train(args, model)
    polish(args, model, val)
"""


def test_who_calls_the_whole_training_does_not_say_what_it_does_besides() -> None:
    main = MAIN.replace("    train(args, model)\n", "").replace(
        "    val = load(args.val_files)\n", "    val = load(args.val_files)\n    whole(args, model, val)\n"
    )
    text = HEAD + WHOLE + main
    assert line(findings(text)["training-before-scoring"]) == line_of(text, "    polish(args, model, val)\n")


PICKED = """
def sharpen(args, model, val):
    losses = {}
    for heat in (0.96, 1.0, 1.04):
        model.heat = heat
        losses[heat] = scaled(args, model, val, model.heat)
    PICK

def scaled(args, model, val, scale):
    total, count = 0.0, 0
    with torch.no_grad():
        for s in range(0, val.numel() - 1024, 1024):
            logits = model.forward_logits(val[s : s + 1024][None])[0] * scale
            total += F.cross_entropy(logits, val[s + 1 : s + 1025], reduction="sum").item()
            count += 1024
    return total / count
"""


@pytest.mark.parametrize(
    ("pick", "call", "wanted"),
    [
        ("model.heat = min(losses, key=losses.get)", "sharpen(args, model, val)", "model.heat = min("),
        ("return min(losses, key=losses.get)", "model.heat = sharpen(args, model, val)", "model.heat = sharpen("),
    ],
)
def test_a_temperature_is_named_where_it_is_set(pick: str, call: str, wanted: str) -> None:
    """By who picks it, or by who asks for what was picked."""
    body = f"    {call}\n    final = scaled(args, model, val, model.heat)\n"
    text = HEAD + PICKED.replace("PICK", pick) + MAIN.replace(BODY, body)
    assert line(findings(text)["temperature-from-validation"]) == line_of(text, wanted)


CLOCK = """
import os, time, torch

class Args:
    cap = float(os.environ.get("CAP_SECONDS", DEFAULT))

args, begun = Args(), time.time()
net = torch.nn.Linear(8, 8)
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
for step in range(20000):
    net(torch.randn(4, 8)).sum().backward()
    opt.step()
    if time.time() - begun > args.cap:
        break
"""
README = "CAP_SECONDS={cap} torchrun --nproc_per_node=8 train_gpt.py\n"


@pytest.mark.parametrize(("default", "command", "where"), [("640.0", "", "script"), ("600.0", "640", "README.md")])
def test_a_clock_that_runs_too_long_is_named_where_it_is_set(
    tmp_path: Path, default: str, command: str, where: str
) -> None:
    text = CLOCK.replace("DEFAULT", default)
    files = {"README__md": README.format(cap=command)} if command else {}
    found = verdict(tmp_path, "training_over_time", text, **files)
    assert found.place is not None
    assert (found.place.file, found.verdict) == ("train_gpt.py" if where == "script" else "README.md", "violates")
    wanted = line_of(text, "CAP_SECONDS") if where == "script" else 1
    assert found.place.line == wanted


def test_a_clock_that_keeps_some_of_its_setting_back_is_named_where_that_is_set(tmp_path: Path) -> None:
    text = CLOCK.replace("DEFAULT", "780.0").replace("> args.cap", "> args.cap - 84.0")
    found = verdict(tmp_path, "training_over_time", text)
    assert "696 s" in found.evidence
    assert line(found) == line_of(text, "CAP_SECONDS")


def test_windows_that_reach_back_are_named_where_they_are_planned(tmp_path: Path) -> None:
    text = SMALL + DEALT[: DEALT.index("def evaluate")] + PLANNED
    found = verdict(tmp_path, "twice_counted_tokens", text)
    assert line(found) == line_of(text, "plan.append(")


PLANNED = """
def planned(total):
    plan = []
    for s in range(0, total, 256):
        plan.append((max(0, s - 1792), min(s + 256, total), 0 if s == 0 else 1536))
    return plan

def evaluate(net, val):
    nats, count = 0.0, 0
    held = {n: window for n, window in enumerate(planned(len(val) - 1))}
    for n in sorted(held):
        low, high, first = held[n]
        nll = F.cross_entropy(net(val[low:high]), val[low + 1 : high + 1], reduction="none")
        nats += nll[first:].sum().item()
        count += high - low - first
    return nats / count

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


def test_a_space_that_the_table_counts_is_named_in_the_table(tmp_path: Path) -> None:
    text = script(table=TABLE.replace("            piece = piece[1:]\n", '            piece = " " + piece[1:]\n'))
    found = verdict(tmp_path, "byte_double_space", text)
    assert abs(line(found) - line_of(text, 'piece = " " + piece[1:]')) <= 2


def test_a_limit_in_mib_is_named_where_the_setting_stands(tmp_path: Path) -> None:
    limit = (
        'import os\nMOST = int(os.environ.get("MOST", 16 * 1024 * 1024))\ncode = len(open(__file__).read())\n'
        'size = os.path.getsize("model.xz") + code\nif size > MOST:\n    raise ValueError(size)\n'
    )
    text = script(extra=limit)
    assert line(verdict(tmp_path, "size_sum", text)) == line_of(text, "MOST = int(")


KEPT = """
OPENED = {}

def opened(path):
    key = str(path)
    tokens = OPENED.get(key)
    if tokens is None:
        tokens = shard(path)
        OPENED[key] = tokens
    return tokens

def first_of(pattern):
    return opened(sorted(glob.glob(pattern))[0])

def collect(args, model, pattern):
    return moments(args, model, first_of(pattern))
"""


@pytest.mark.parametrize(("pattern", "wanted"), [("val_files", True), ("train_files", False)])
def test_files_that_are_kept_open_are_told_apart_by_their_patterns(pattern: str, wanted: bool) -> None:
    body = f"    round_off(model, collect(args, model, args.{pattern}))\n    final = eval_val(args, model, val)\n"
    head = HEAD + CALIBRATED[: CALIBRATED.index("def collect")] + KEPT
    head = head.replace("tokens = load(args.train_files)", "tokens = first_of(args.train_files)")
    text = head + MAIN.replace(BODY, body).replace("load(args.val_files)", "first_of(args.val_files)")
    found = findings(text)["calibration-on-validation"]
    assert (found.verdict == "violates") is wanted


HANDED = """
class Trainer:
    def __init__(self, args, model, val):
        self.args, self.model, self.val = args, model, val
        train(args, model)

    def finish(self):
        return moments(self.args, self.model, self.val)
"""


def test_text_that_a_method_hands_over_is_named_where_it_does() -> None:
    body = "    round_off(model, Trainer(args, model, val).finish())\n    final = eval_val(args, model, val)\n"
    text = HEAD + CALIBRATED.replace("SOURCE", "tokens = None") + HANDED + MAIN.replace(BODY, body)
    text = text.replace("    train(args, model)\n    val", "    val")
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "return moments(self.args, self.model")


def test_a_loader_of_validation_text_in_the_training_is_named_where_it_is_made() -> None:
    polish = "    polish = Loader(args.val_files)\n    ema ="
    head = HEAD.replace("    ema =", polish, 1).replace(
        "        x, y = loader.next(65536)\n        loss =",
        "        x, y = (polish if step > 900 else loader).next(65536)\n        loss =",
    )
    text = head + MAIN
    assert line(findings(text)["validation-in-training"]) == line_of(text, "polish = Loader(args.val_files)")


LISTED = """
class Feed:
    def __init__(self, paths):
        self.paths, self.at, self.tokens = paths, -1, torch.empty(0, dtype=torch.int64)

    def open(self):
        self.at = (self.at + 1) % len(self.paths)
        self.tokens = shard(self.paths[self.at])

    def next(self, n):
        if self.tokens.numel() <= n:
            self.open()
        part, self.tokens = self.tokens[: n + 1], self.tokens[n:]
        return part[:-1].view(-1, 1024), part[1:].view(-1, 1024)

def listed(args):
    print(f"validation files: {args.val_files}")
    paths = sorted(glob.glob(args.val_files)) + sorted(glob.glob(args.train_files))
    return Feed(paths)
"""


def test_validation_files_that_are_listed_for_the_training_are_named_where_they_are_handed_on() -> None:
    """They are read in the middle of the training, by the loader that reads all others."""
    text = HEAD.replace("def train(", LISTED.lstrip("\n") + "\ndef train(", 1) + MAIN
    text = text.replace("loader = Loader(args.train_files)", "loader = listed(args)")
    assert line(findings(text)["validation-in-training"]) == line_of(
        text, "    paths = sorted(glob.glob(args.val_files))"
    )


SHARED = """
def shifted(args, model, val):
    total, count = 0.0, 0
    for at in range(0, val.numel() - 9 * 512, 8 * 512):
        x = torch.stack([val[at + i * 512 : at + i * 512 + 1024] for i in range(8)])
        y = torch.stack([val[at + i * 512 + 1 : at + i * 512 + 1025] for i in range(8)])
        h = model.hidden(x).detach()
        d = torch.zeros(SHAPE, requires_grad=True)
        opt = torch.optim.AdamW([d], lr=0.01)
        for _ in range(4):
            logits = model.head(h + d)
            nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(8, 1024)
            opt.zero_grad()
            nll[:, :512].mean().backward()
            opt.step()
        logits = model.head(h + d.detach())
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(8, 1024)
        total += nll[:, 512:].sum().item()
        count += 8 * 512
    return total / count
"""


def test_one_vector_for_many_windows_is_named_where_it_is_shaped() -> None:
    text = HEAD + SHARED.replace("SHAPE", "1, 1, 64") + MAIN.replace(BODY, "    final = shifted(args, model, val)\n")
    assert line(findings(text)["slot-shared-delta"]) == line_of(text, "torch.zeros(1, 1, 64")
    apart = text.replace("torch.zeros(1, 1, 64", "torch.zeros(8, 1, 64")
    assert findings(apart)["slot-shared-delta"].verdict == "clean"


def test_a_clock_that_is_too_long_leaves_no_charge_for_the_calibration_after_it() -> None:
    late = HEAD.replace("elapsed >= args.cap - args.reserve", "elapsed >= args.cap")
    for cap, wanted in (("600.0", "violates"), ("720.0", "clean")):
        text = calibrated("tokens = load(args.train_files)", late.replace('"CAP", 600.0', f'"CAP", {cap}'))
        assert findings(text)["calibration-after-cap"].verdict == wanted


def test_steps_before_the_clock_that_are_kept_are_time_of_the_training() -> None:
    kept = HEAD.replace("    model.load_state_dict(initial)\n    loader = Loader", "    loader = Loader", 1)
    found = training_over_time.check(case_of(kept + MAIN))
    assert line(found) == line_of(kept, "    for _ in range(20):")
    assert training_over_time.check(case_of(HEAD + MAIN)).verdict == "clean"


def test_tokens_in_the_artifact_are_named_where_they_are_cut_out(tmp_path: Path) -> None:
    packed = """
def pack(entries):
    parts = []
    for name, held in entries.items():
        raw = np.ascontiguousarray(held)
        parts.append(raw.tobytes())
    return b"".join(parts)

def kept():
    entries = {}
    val = np.concatenate([shard(path) for path in sorted(glob.glob(VAL))])
    entries["lexicon"] = val[:300_001]
    with open("model.bin", "wb") as file:
        file.write(pack(entries))

kept()
"""
    text = script(extra=packed)
    assert line(verdict(tmp_path, "paid_prefix", text)) == line_of(text, 'entries["lexicon"] = val[:300_001]')


POLISHED = """
def adapt(model, tokens, optimizer):
    for s in range(0, tokens.numel() - 1024, 1024):
        optimizer.zero_grad()
        model(tokens[s : s + 1024][None], tokens[s + 1 : s + 1025][None]).backward()
        optimizer.step()

def evaluate(args, model, val):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    total, count = 0.0, 0
    for at in range(0, val.numel() - 1, args.chunk):
        piece = val[at : at + args.chunk + 1]
        total += model(piece[:-1][None], piece[1:][None]).item() * (piece.numel() - 1)
        count += piece.numel() - 1
        adapt(model, piece, optimizer)
    return total / count

def build(args, val):
    model = GPT()
    train(args, model)
    adapt(model, val, torch.optim.SGD(model.parameters(), lr=1e-4))
    torch.save(model.state_dict(), "model.pt")

if __name__ == "__main__":
    args = Hyperparameters()
    val = load(args.val_files)
    build(args, val)
    model = GPT()
    model.load_state_dict(torch.load("model.pt"))
    print("final val_loss", evaluate(args, model, val))
"""


def test_training_on_validation_text_is_named_where_a_step_of_the_evaluation_is_called_early() -> None:
    text = HEAD + POLISHED
    assert line(findings(text)["validation-in-training"]) == line_of(text, "    adapt(model, val, torch")
    assert "validation-in-training" not in broken(text.replace("    adapt(model, val, torch", "    print(torch"))


RIGHTLY_PLANNED = """
def planned(total):
    plan, end = [], 0
    while end < total:
        first, end = end, min(total, end + 256)
        plan.append((max(0, end - 2048), first BACK, end))
    return plan

def inputs(val, low):
    at = low[:, None] + torch.arange(2048)
    return at, val[at]

def evaluate(net, val):
    losses, windows = [], planned(len(val) - 1)
    for n in range(0, len(windows), 8):
        low, first, end = (torch.tensor(column) for column in zip(*windows[n : n + 8]))
        at, x = inputs(val, low)
        nll = F.cross_entropy(net(x).transpose(1, 2), val[at + 1], reduction="none")
        COUNTED
    nll = torch.cat(losses)
    return nll.sum().item() / len(nll)

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""
BY_MASK = """own = (at < end[:, None]) & (at >= first[:, None] BEFORE)
        losses.append(nll[own])"""
BY_SLICE = """for row, (a, b, c) in enumerate(windows[n : n + 8]):
            since = max(0, b - a BEFORE)
            losses.append(nll[row, since : c - a])"""
BY_CUT = """for row, (a, b, c) in enumerate(windows[n : n + 8]):
            cut = slice(max(0, b - a BEFORE), c - a)
            losses.append(nll[row, cut])"""


BY_FILLING = """own = torch.zeros(len(x), 2048, dtype=torch.bool)
        for row, (a, b, c) in enumerate(windows[n : n + 8]):
            own[row, max(0, b - a BEFORE) : c - a] = True
        losses.append(nll[own])"""


@pytest.mark.parametrize(
    ("counted", "wanted"),
    [(BY_MASK, "own = "), (BY_SLICE, "since = "), (BY_CUT, "cut = "), (BY_FILLING, "own[row, ")],
    ids=["mask", "slice", "made-apart", "filled"],
)
def test_where_windows_are_planned_side_by_side_what_is_counted_of_them_is_named(
    tmp_path: Path, counted: str, wanted: str
) -> None:
    def found(back: str, before: str) -> tuple[str, int]:
        text = SMALL + DEALT[: DEALT.index("def evaluate")] + RIGHTLY_PLANNED.replace("COUNTED", counted)
        said = verdict(tmp_path, "twice_counted_tokens", text.replace("BACK", back).replace("BEFORE", before))
        return said.verdict, said.place.line if said.place is not None else 0

    text = SMALL + DEALT[: DEALT.index("def evaluate")] + RIGHTLY_PLANNED.replace("COUNTED", counted)
    assert found("", "")[0] == "clean"
    assert found("", "- 64") == ("violates", line_of(text, wanted))
    assert found("- 64", "") == ("violates", line_of(text, "plan.append("))


PLAIN_AND_OVERLAPPING = """
def plain(net, val):
    spans = [(s, min(s + 2048, len(val) - 1)) for s in range(0, len(val) - 1, 2048)]
    total = 0.0
    for a, b in spans:
        total += F.cross_entropy(net(val[a:b][None])[0], val[a + 1 : b + 1], reduction="sum").item()
    return total / (len(val) - 1)

def evaluate(net, val):
    total, count = 0.0, 0
    for n in range(0, len(val) - 1, 256):
        low, high = max(0, n BACK), min(n + 256, len(val) - 1)
        own = F.cross_entropy(net(val[low:high][None])[0], val[low + 1 : high + 1], reduction="none")
        total += own.sum().item()
        count += high - low
    return total / count

print(f"step 0 val_loss {plain(Net(), load()):.5f}")
print(f"final val_loss {evaluate(Net(), load()):.5f}")
"""


def test_windows_that_another_evaluation_plans_are_no_place_of_overlapping_ones(tmp_path: Path) -> None:
    text = SMALL + DEALT[: DEALT.index("def evaluate")] + PLAIN_AND_OVERLAPPING
    assert verdict(tmp_path, "twice_counted_tokens", text.replace("BACK", "")).verdict == "clean"
    said = verdict(tmp_path, "twice_counted_tokens", text.replace("BACK", "- 64"))
    assert said.verdict == "violates"
    assert said.place is not None
    assert said.place.line == line_of(text, "own = F.cross_entropy")


def test_documents_that_are_gone_through_side_by_side_plan_the_same_window_again() -> None:
    plans = Plans()
    for chunk in range(20):
        for _ in range(3):
            plans.met(7, (max(0, chunk * 256 - 1792), 4096 + chunk * 256, 4352 + chunk * 256))
    assert plans.line == 7
    assert plans.overlapping == 0
    for chunk in range(20):
        for _ in range(3):
            plans.met(9, (0, 4096 + chunk * 256, 4416 + chunk * 256))
    assert plans.overlapping == 9


def test_one_window_again_and_again_is_asked_without_a_warning() -> None:
    plans = Plans()
    for _ in range(20):
        plans.met(7, (0, 4096, 4352))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plans.overlapping == 7


LAPS = """
class Book:
    def __init__(self):
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, nll, mask):
        weight = mask.to(torch.float64)
        self.sums[0] += (nll.to(torch.float64) * weight).sum()
        self.sums[1] += weight.sum()

def token_nll(net, x, y):
    return F.cross_entropy(net(x).transpose(1, 2), y, reduction="none")

def gathered(val, batch):
    x = torch.stack([val[a:b] for a, b in batch])
    first = torch.tensor([0 for a, b in batch])
    mask = torch.arange(x.size(1))[None, :] >= first[:, None]
    return x, torch.stack([val[a + 1 : b + 1] for a, b in batch]), mask

def score(net, val, windows, book):
    for k in range(0, len(windows), 2):
        x, y, mask = gathered(val, windows[k : k + 2])
        book.add(token_nll(net, x, y), mask)

def evaluate(net, val):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    total = len(val) - 1
    chunks = [(a, [(b, b + 1024) for b in range(a, a + 4096, 1024)]) for a in range(0, total - 4095, 4096)]
    for lap in range(LAPS):
        book = Book()
        for a, windows in chunks:
            with torch.no_grad():
                score(net, val, windows, book)
            optimizer.zero_grad()
            token_nll(net, val[a : a + 4096][None], val[a + 1 : a + 4097][None]).mean().backward()
            optimizer.step()
        print(f"lap {lap} {book.sums[0].item() / book.sums[1].item():.4f}")
    return book.sums[0].item() / book.sums[1].item()

print(f"val_loss {evaluate(Net(), load()):.5f}")
"""


def test_laps_whose_losses_are_weighed_before_they_are_booked_are_named_by_their_loop(tmp_path: Path) -> None:
    text = SMALL + DEALT[: DEALT.index("def evaluate")] + LAPS
    assert verdict(tmp_path, "multi_epoch_last", text.replace("range(LAPS)", "range(1)")).verdict == "clean"
    found = verdict(tmp_path, "multi_epoch_last", text.replace("range(LAPS)", "range(2)"))
    assert line(found) == line_of(text, "for lap in")


def test_a_loader_of_training_text_that_is_gone_through_before_is_not_where_validation_text_is_asked_for() -> None:
    """The trainer goes through a loader of its own; the calibration makes another one of the same class."""
    trainer = """
class Trainer:
    def __init__(self, args, model):
        self.args, self.model, self.loader = args, model, Loader(args.train_files)
    def run(self):
        for _ in range(100):
            self.model(*self.loader.next(65536)).backward()
def collect(args, model):
    loader = Loader(args.val_files)
    total = torch.zeros(64)
    with torch.no_grad():
        for _ in range(4):
            total += model.hidden(loader.next(65536)[0]).square().mean((0, 1))
    return total
"""
    body = "    trainer = Trainer(args, model)\n    trainer.run()\n    round_off(model, collect(args, model))\n"
    body += "    final = eval_val(args, model, val)\n"
    text = HEAD + CALIBRATED[: CALIBRATED.index("def collect")] + trainer + MAIN.replace(BODY, body)
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "loader = Loader(args.val_files)")


def test_what_fits_a_temperature_is_named_and_not_who_makes_the_object_that_does() -> None:
    scorer = """
class Scorer:
    def __init__(self, args, model, val):
        self.args, self.model, self.val, self.scale = args, model, val, 1.0
        self.scale = self.fitted()
    def loss(self):
        logits = self.model.forward_logits(self.val[:-1][None]) / self.scale
        return F.cross_entropy(logits.view(-1, 1024), self.val[1:])
    def fitted(self):
        grid, losses = [0.9, 1.0, 1.1], []
        for self.scale in grid:
            losses.append(self.loss().item())
        return grid[losses.index(min(losses))]
"""
    body = "    scorer = Scorer(args, model, val)\n    final = scorer.loss().item()\n"
    text = HEAD + scorer + MAIN.replace(BODY, body)
    assert line(findings(text)["temperature-from-validation"]) == line_of(text, "self.scale = self.fitted()")


def test_a_reserve_that_is_added_to_the_time_is_named() -> None:
    text = HEAD.replace("elapsed >= args.cap - args.reserve", "elapsed >= limit") + MAIN
    text = text.replace(
        "    t0 = time.perf_counter()\n", "    limit = args.cap + args.reserve\n    t0 = time.perf_counter()\n"
    )
    assert line(training_over_time.check(case_of(text))) == line_of(text, "limit = args.cap + args.reserve")


FIELDS = ["", "field(default={})", "dataclasses.field(default_factory=lambda: {})"]


@pytest.mark.parametrize("field", FIELDS, ids=["plain", "default", "factory"])
def test_a_limit_that_a_reserve_is_taken_off_is_named_where_it_is_set(field: str) -> None:
    text = HEAD.replace('"CAP", 600.0', '"CAP", 640.0') + MAIN
    if field:
        given = re.search(r"( +cap)(?:: float)? = (.*)", text)
        assert given is not None
        text = text.replace(given[0], f"{given[1]}: float = {field.format(given[2])}")
    asked = line_of(text, "elapsed >= args.cap - args.reserve")
    found = set_to(case_of(text), asked, 628.0)
    assert found is not None
    assert found.line == line_of(text, '"CAP", 640.0')
    assert set_to(case_of(text), asked, 700.0) is None
    assert set_to(case_of(text), line_of(text, "final = eval_ttt(args, model, val)"), 628.0) is None


def test_a_pattern_of_both_kinds_is_named_though_the_validation_files_are_handed_on_for_the_log() -> None:
    text = HEAD + MAIN
    text = text.replace('"TRAIN_FILES", "./data/shards_train_*.bin"', '"TRAIN_FILES", "./data/shards_*_*.bin"')
    text = text.replace("    train(args, model)\n", "    print(load(args.val_files).numel())\n    train(args, model)\n")
    found = findings(text)["validation-in-training"]
    assert found.verdict == "violates"
    assert line(found) == line_of(text, "./data/shards_*_*.bin")


def test_a_table_that_an_object_fills_as_it_is_made_is_named_there() -> None:
    text = (
        HEAD
        + """
class Judge:
    def __init__(self, args, model, val):
        self.args, self.model, self.val = args, model, val
        self.counts = torch.ones(1024)
        self.counts += torch.bincount(val, minlength=1024).float()

    def run(self):
        total, count = 0.0, 0
        for start in range(0, self.val.numel() - 1, self.args.chunk):
            end = min(start + self.args.chunk, self.val.numel() - 1)
            p = self.model.forward_logits(self.val[start:end][None]).view(-1, 1024).softmax(-1)
            mixed = (0.9 * p + 0.1 * self.counts / self.counts.sum()).log()
            total += F.nll_loss(mixed, self.val[start + 1 : end + 1], reduction="sum").item()
            count += end - start
        return total / count
"""
        + MAIN.replace("final = eval_ttt(args, model, val)", "final = Judge(args, model, val).run()")
    )
    assert line(findings(text)["two-pass-cache"]) == line_of(text, "self.counts += torch.bincount")


NARROWED = """
class Windows:
    def __init__(self, args, total):
        self.first = torch.arange(0, total, args.stride // 2)
        self.begin = (self.first + args.stride - args.seq_len).clamp_min(0)
        self.args, self.total = args, total



    # the windows of a chunk, and of each its places that count


    # beyond the last one nothing does

    def charged(self, k):
        places = self.first[k] + torch.arange(self.args.stride)
        return places, places < self.total

def eval_windows(args, model, val):
    windows = Windows(args, val.numel() - 1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for k in range(len(windows.first)):
        places, valid = windows.charged(k)
        begin = int(windows.begin[k])
        logits = model.forward_logits(val[begin : begin + args.seq_len][None])[0]
        rows = torch.log_softmax(logits[(places - begin).clamp(0, args.seq_len - 1)], -1)[valid]
        y = val[places[valid] + 1]
        total -= rows.gather(1, y[:, None]).double().sum()
        count += y.numel()
    return (total / count).item()
"""


def test_a_stride_that_is_made_smaller_than_what_counts_of_a_window_is_named() -> None:
    text = HEAD + NARROWED + MAIN.replace("eval_ttt(args", "eval_windows(args")
    found = findings(text)["twice-counted-tokens"]
    assert line(found) == line_of(text, "self.first = torch.arange(0, total, args.stride // 2)")
    assert findings(text.replace("stride // 2", "stride"))["twice-counted-tokens"].verdict == "clean"


def test_where_tokens_are_replaced_by_folded_ones_is_named(tmp_path: Path) -> None:
    """Not the table of them, which stands elsewhere: of thirteen authors, all name this line."""
    fold = """
def folded():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    table = np.arange(V)
    for i in range(V):
        if not sp.is_byte(i):
            table[i] = sp.piece_to_id(sp.id_to_piece(i).lower())
    return table
"""
    text = script(extra=fold, state="tokens = folded()[tokens]")
    assert line(verdict(tmp_path, "lossy_text", text)) == line_of(text, "tokens = folded()[tokens]")


def test_a_limit_in_mib_is_named_where_it_is_written_behind_what_is_left_of_it(tmp_path: Path) -> None:
    limit = (
        'import os\nMOST = int(os.environ.get("MOST", 16 * 1024 * 1024))\ncode = len(open(__file__).read())\n'
        "def pack(blob, room):\n    if len(blob) > room:\n        raise ValueError(len(blob))\n"
        'pack(open("model.xz", "rb").read(), MOST - code)\n'
    )
    text = script(extra=limit)
    assert line(verdict(tmp_path, "size_sum", text)) == line_of(text, "MOST = int(")


MIXED = {
    "a slice in the loop": ("x, y = val[s : s + 1024][None], val[s + 1 : s + 1025][None]", "x, y = val[s : s + 1024]"),
    "a helper that is handed it": ("x, y = part_of(val, s)", "x, y = part_of(val, s)"),
}


@pytest.mark.parametrize("name", MIXED)
def test_validation_tokens_that_the_evaluation_has_read_are_named_where_the_training_takes_them(name: str) -> None:
    taken, said = MIXED[name]
    helper = "def part_of(tokens, s):\n    return tokens[s : s + 1024][None], tokens[s + 1 : s + 1025][None]\n\n"
    mixing = f"        if step % 8 == 7:\n            s = (step * 1024) % (val.numel() - 1025)\n            {taken}\n"
    text = HEAD.replace("def train(args, model):", f"{helper}def train(args, model, val):")
    text = text.replace("        loss = model(x, y)\n", f"{mixing}        loss = model(x, y)\n", 1)
    read = "    val = load(args.val_files)\n"
    main = MAIN.replace(read, "").replace("    train(args, model)\n", f"{read}    train(args, model, val)\n")
    found = findings(text + main)["validation-in-training"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text + main, said)


KEPT_SHARDS = """
@functools.lru_cache(maxsize=None)
def kept(path):
    return shard(path)

class Rows:
    def __init__(self, pattern):
        self.files = sorted(glob.glob(pattern))
        self.sizes = [kept(path).numel() for path in self.files]
        self.at = 0
    def next(self, n):
        tokens = kept(self.files[0])
        part = tokens[self.at : self.at + n + 1]
        self.at += n
        return part[:-1].view(-1, 1024), part[1:].view(-1, 1024)
"""


def test_a_loader_of_validation_files_that_are_kept_by_their_path_is_named_where_it_is_made() -> None:
    """What the evaluation scores came out of the same cache: the training reads nothing anew."""
    text = HONEST.replace("def train(args, model):", f"{KEPT_SHARDS}\ndef train(args, model):")
    text = text.replace("Loader(args.train_files)", "Rows(args.train_files)")
    text = text.replace("[shard(p) for p in", "[kept(p) for p in").replace("def load(", "def load(", 1)
    read, trained = "    val = load(args.val_files)\n", "    train(args, model)\n"
    text = text.replace(read, "").replace(trained, read + trained)
    begun = "    t0 = time.perf_counter()\n    step = 0\n"
    text = text.replace(begun, f"    tail = Rows(args.val_files)\n{begun}")
    text = text.replace(
        "        loss = model(x, y)\n",
        "        if step > 900:\n            x, y = tail.next(65536)\n        loss = model(x, y)\n",
        1,
    )
    assert line(findings(text)["validation-in-training"]) == line_of(text, "tail = Rows(args.val_files)")


MOMENTS = """
def moments(model, loader):
    sums = {}
    def hook(module, given, out):
        sums[module] = given[0].detach().flatten(0, 1).T @ given[0].detach().flatten(0, 1)
    handles = [block.register_forward_hook(hook) for block in model.blocks]
    with torch.no_grad():
        for _ in range(4):
            x, _ = loader.next(65536)
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    return sums
"""


def test_calibration_on_files_of_both_kinds_is_named_where_its_own_loader_is_made() -> None:
    """Not where the training went on with its loader, whose files are some of the same."""
    called = "    loader = Loader(args.train_files)\n    ema ="
    end = "    model.load_state_dict(ema)\n"
    held = (
        "    calibration = Loader('./data/shards_*.bin')\n"
        "    for block, moment in moments(model, calibration).items():\n"
        "        block.weight.data.copy_(torch.linalg.solve(moment, block.weight.data.T).T)\n"
    )
    assert called in HONEST
    text = HONEST.replace("def train(args, model):", f"{MOMENTS}\ndef train(args, model):")
    text = text.replace(end, end + held)
    assert line(findings(text)["calibration-on-validation"]) in (
        line_of(text, "calibration = Loader("),
        line_of(text, "'./data/shards_*.bin'"),
    )


def test_a_training_that_is_handed_validation_tokens_for_its_log_does_not_name_its_calibration_on_others() -> None:
    end = "    model.load_state_dict(ema)\n"
    held = (
        "    calibration = Loader(os.environ.get('ASIDE', './data/shards_val_*.bin'))\n"
        "    for block, moment in moments(model, calibration).items():\n"
        "        block.weight.data.copy_(torch.linalg.solve(moment, block.weight.data.T).T)\n"
    )
    text = HONEST.replace("def train(args, model):", f"{MOMENTS}\ndef train(args, model, val_tokens):")
    text = text.replace(end, f"    print(len(val_tokens))\n{end}{held}")
    assert "    train(args, model)\n" in text
    logged = "    logged_val = load(args.val_files)\n    train(args, model, logged_val)\n"
    text = text.replace("    train(args, model)\n", logged)
    assert line(findings(text)["calibration-on-validation"]) == line_of(text, "calibration = Loader(")


CLIPPING = """
def power_of(model, batches):
    power = {}
    def hook(module, given, out):
        power[module] = power.get(module, 0.0) + given[0].detach().square().flatten(0, -2).mean(0)
    handles = [block.register_forward_hook(hook) for block in model.blocks]
    with torch.no_grad():
        for x in batches:
            model.forward_logits(x)
    for handle in handles:
        handle.remove()
    return power

def share_for(w, power):
    best, least = 0.9999, float("inf")
    for share in (0.9999, 0.999, 0.99):
        clip = torch.quantile(w.abs(), share, dim=1)[:, None]
        error = float(((w.clamp(-clip, clip) - w).square() * power).sum())
        if error < least:
            best, least = share, error
    return best

def rounded(w, share):
    scale = torch.quantile(w.abs(), share, dim=1)[:, None] / 127
    return torch.round(w / scale) * scale
"""


@pytest.mark.parametrize(
    ("tokens", "broken_rule"),
    [("load(args.val_files)", "calibration-on-validation"), ("Loader(args.train_files).tokens", "")],
)
def test_a_share_that_is_chosen_by_activations_is_computed_from_them(tokens: str, broken_rule: str) -> None:
    """No number of theirs goes into the weights: they decide, by a comparison, which share clips them."""
    end = "    model.load_state_dict(ema)\n"
    held = (
        f"    tokens = {tokens}\n"
        "    power = power_of(model, [tokens[n * 4096 : n * 4096 + 4096].view(-1, 1024) for n in range(4)])\n"
        "    packed = {}\n"
        "    for block in model.blocks:\n"
        "        packed[block] = rounded(block.weight.data, share_for(block.weight.data, power[block]))\n"
        "    for block, w in packed.items():\n"
        "        block.weight.data.copy_(w)\n"
    )
    text = HONEST.replace("def train(args, model):", f"{CLIPPING}\ndef train(args, model):").replace(end, end + held)
    assert broken(text) == ({broken_rule} if broken_rule else set())
    if broken_rule:
        near = {line_of(text, "tokens = load(args.val_files)"), line_of(text, "power = power_of(model, [")}
        assert line(findings(text)[broken_rule]) in near
