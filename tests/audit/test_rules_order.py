"""The rules of order: what had a score seen? Each fault in several styles, and its honest look-alikes."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.passes.charged import passes_of
from tests.audit.order import HEAD, HONEST, MAIN, broken, case_of, doubted, findings, line_of

EVAL = "    final = eval_ttt(args, model, val)\n"
TTT_TRAIN = "        if ci < n - 1:\n"
SAY = '    print(f"final val_loss'

SCORING = HONEST[HONEST.index("        model.eval()\n        with torch.inf") : HONEST.index(TTT_TRAIN)]  # of a chunk


def with_main(body: str, head: str = HEAD) -> str:
    """The base script with other steps between loading the validation tokens and reporting `final`."""
    return head + MAIN.replace(EVAL, body)


def test_score_first_adaptation_with_a_baseline_before_it_is_clean() -> None:
    assert doubted(HONEST) == set()


FAULTS = {
    "a second pass with adapted weights": (
        "rescoring-after-adaptation",
        with_main("    eval_ttt(args, model, val)\n    final = eval_val(args, model, val)\n"),
    ),
    "a second pass through an alias, a partial and a wrapper": (
        "rescoring-after-adaptation",
        with_main(
            "    again = functools.partial(eval_val, args)\n    net = torch.compile(model)\n"
            "    eval_ttt(args, model, val)\n    final = (lambda m: again(m, val))(net)\n"
        ),
    ),
    "weights carried over in a dict of clones": (
        "rescoring-after-adaptation",
        with_main(
            "    eval_ttt(args, model, val)\n    kept = {k: v.clone() for k, v in model.state_dict().items()}\n"
            "    other = GPT().cuda()\n    other.load_state_dict(kept)\n    final = eval_val(args, other, val)\n"
        ),
    ),
    "training on validation, then scoring": (
        "training-before-scoring",
        with_main(
            "    opt = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "    for i in range(0, val.numel() - 1024, 1024):\n"
            "        model(val[i : i + 1024][None], val[i + 1 : i + 1025][None]).backward()\n"
            "        opt.step()\n        opt.zero_grad()\n    final = eval_val(args, model, val)\n"
        ),
    ),
    "the same by hand, with writes in place": (
        "training-before-scoring",
        with_main(
            "    for i in range(0, val.numel() - 1024, 1024):\n"
            "        l = model(val[i : i + 1024][None], val[i + 1 : i + 1025][None])\n"
            "        for p, g in zip(model.parameters(), torch.autograd.grad(l, list(model.parameters()))):\n"
            "            p.data.add_(g, alpha=-0.1)\n    final = eval_val(args, model, val)\n"
        ),
    ),
    "the two phases of a chunk change places": (
        "training-before-scoring",
        HONEST.replace(SCORING, "").replace(
            "                    opt.step()\n    return (total", f"                    opt.step()\n{SCORING}    return (total"
        ),
    ),
    "training starts one chunk ahead": (
        "training-before-scoring",
        HONEST.replace("for s in range(start, end, args.seq_len)", "for s in range(start + args.chunk, end + args.chunk, args.seq_len)"),
    ),
    "epochs around the whole, the last is reported": (
        "multi-epoch-last",
        HONEST.replace("    for ci in range(n):\n", "    for ci in [c for _ in range(4) for c in range(n)]:\n"),
    ),
    "epochs as an outer loop that resets the sums": (
        "multi-epoch-last",
        HONEST.replace(
            HONEST[HONEST.index("    for ci in range(n):\n") : HONEST.index("    return (total / count).item()\n\ndef main")],
            "    for epoch in range(3):\n        total.zero_()\n        count = 0\n"
            + "".join(
                "    " + line + "\n"
                for line in HONEST[
                    HONEST.index("    for ci in range(n):\n") : HONEST.index("    return (total / count).item()\n\ndef main")
                ].splitlines()
            ),
        ),
    ),
    "the smaller of two passes": (
        "min-over-passes",
        with_main("    final = min(eval_ttt(args, model, val), eval_val(args, model, val))\n"),
    ),
    "the best of a loop, kept by an if": (
        "min-over-passes",
        with_main(
            "    final = float('inf')\n    for lr in (0.1, 0.2, 0.3):\n        now = eval_ttt(args, model, val)\n"
            "        if now < final:\n            final = now\n"
        ),
    ),
    "a grid of temperatures": (
        "temperature-from-validation",
        with_main(
            "    best, best_t = 1e9, 1.0\n    for t in (0.9, 0.95, 1.05):\n        model.temperature = t\n"
            "        now = eval_val(args, model, val)\n        if now < best:\n            best, best_t = now, t\n"
            "    model.temperature = best_t\n    final = eval_val(args, model, val)\n",
            HEAD.replace("return self.head(self.hidden(x))", "return self.head(self.hidden(x)) / self.temperature"),
        ),
    ),
    "a temperature picked by its place in a vector of losses": (
        "temperature-from-validation",
        with_main(
            "    def tempered(t, lo):\n        logits = model.forward_logits(val[lo : lo + 1024][None]).view(-1, 1024) / t\n"
            "        return F.cross_entropy(logits, val[lo + 1 : lo + 1025])\n    grid = torch.linspace(0.9, 1.1, 9)\n"
            "    t = grid[torch.argmin(torch.stack([tempered(each, 0) for each in grid]))]\n    total, count = 0.0, 0\n"
            "    for lo in range(0, val.numel() - 1024, 1024):\n        total += tempered(t, lo).item()\n        count += 1\n    final = total / count\n"
        ),
    ),
    "a temperature fitted by gradient": (
        "temperature-from-validation",
        with_main(
            "    tau = torch.ones(1, requires_grad=True)\n    opt = torch.optim.Adam([tau], lr=0.01)\n"
            "    z = model.forward_logits(val[:-1][None]).detach()\n"
            "    for _ in range(50):\n        loss = F.cross_entropy(z.view(-1, 1024) / tau, val[1:])\n"
            "        opt.zero_grad()\n        loss.backward()\n        opt.step()\n"
            "    final = F.cross_entropy(z.view(-1, 1024) / tau, val[1:]).item()\n"
        ),
    ),
    "the better of two averages by validation": (
        "choice-by-validation",
        with_main(
            "    a = {k: v.clone() for k, v in model.state_dict().items()}\n    train(args, model)\n"
            "    b = {k: v.clone() for k, v in model.state_dict().items()}\n    model.load_state_dict(a)\n"
            "    la = eval_val(args, model, val)\n    model.load_state_dict(b)\n    lb = eval_val(args, model, val)\n"
            "    model.load_state_dict(a if la < lb else b)\n    final = eval_val(args, model, val)\n"
        ),
    ),
    "a delta on the scored positions": (
        "slot-on-scored",
        with_main(
            "    total, count = 0.0, 0\n    for i in range(0, val.numel() - 1024, 1024):\n"
            "        x, y = val[i : i + 1024][None], val[i + 1 : i + 1025][None]\n"
            "        h = model.hidden(x).detach()\n        delta = torch.zeros(1, 1, 64, requires_grad=True)\n"
            "        opt = torch.optim.AdamW([delta], lr=0.01)\n        for _ in range(8):\n"
            "            loss = F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1))\n"
            "            opt.zero_grad()\n            loss.backward()\n            opt.step()\n"
            "        total += F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1)).item()\n        count += 1\n"
            "    final = total / count\n"
        ),
    ),
    "a table filled by a first pass": (
        "two-pass-cache",
        with_main(
            "    table = np.ones((1024, 1024))\n    np.add.at(table, (val[:-1], val[1:]), 1)\n    total, count = 0.0, 0\n"
            "    for i in range(0, val.numel() - 1024, 1024):\n        p = table[val[i : i + 1024]]\n"
            "        p = p / p.sum(1)\n        total -= np.log(p[np.arange(1024), val[i + 1 : i + 1025]]).sum()\n        count += 1024\n"
            "    final = total / count\n"
        ),
    ),
    "a table filled through one-hot masks by a first pass": (
        "two-pass-cache",
        with_main(
            "    table = torch.ones(1024)\n    for i in range(0, val.numel() - 1024, 1024):\n        table[torch.arange(1024)[None] == val[i : i + 1024, None]] += 1\n"
            "    total, count = 0.0, 0\n    for i in range(0, val.numel() - 1024, 1024):\n        p = table / table.sum()\n"
            "        total -= torch.log(p[val[i + 1 : i + 1025]]).sum().item()\n        count += 1024\n    final = total / count\n"
        ),
    ),
    "training reads validation shards": (
        "validation-in-training",
        HONEST.replace("loader = Loader(args.train_files)\n    ema", "loader = Loader(args.val_files)\n    ema"),
    ),
    "a pattern that fits both splits": ("validation-in-training", HONEST.replace("shards_train_*", "shards_*_*")),
    "the first million tokens": ("subset-as-full", HONEST.replace("    val = load(args.val_files)\n", "    val = load(args.val_files)[:1_000_000]\n")),
    "the loop ends by the clock": (
        "subset-as-full",
        HONEST.replace("        model.eval()\n", "        if time.perf_counter() - t0 > 500:\n            break\n        model.eval()\n", 1).replace(
            "    total, count = torch.zeros((), dtype=torch.float64), 0\n", "    total, count = torch.zeros((), dtype=torch.float64), 0\n    t0 = time.perf_counter()\n"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_by_its_rule(name: str) -> None:
    rule, text = FAULTS[name]
    assert rule in broken(text)


def calibrated(loader: str, head: str = HEAD) -> str:
    """The base with weights rounded by second moments that hooks collect over `loader`."""
    return with_main(
        "    moments = {}\n    def hook(m, inputs, output):\n"
        "        x = inputs[0].reshape(-1, 64)\n        moments['h'] = moments.get('h', 0) + x.T @ x\n"
        "    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear)]\n"
        f"    source = {loader}\n    for _ in range(16):\n        x, y = source.next(65536)\n        model.forward_logits(x)\n"
        "    for h in handles:\n        h.remove()\n"
        "    packed = {k: torch.round(v / moments['h'].mean()) for k, v in model.state_dict().items()}\n"
        "    torch.save(packed, 'model.pt')\n    fresh = GPT().cuda()\n    fresh.load_state_dict(torch.load('model.pt'))\n"
        "    final = eval_val(args, fresh, val)\n",
        head,
    )


def test_calibration_on_validation_is_followed_through_hooks_and_a_file() -> None:
    assert "calibration-on-validation" in broken(calibrated("Loader(args.val_files)"))


def test_a_calibration_is_followed_through_a_copy_of_the_bytes_that_were_read() -> None:
    """torch.frombuffer(bytearray(data)) is how a script reads what it may write to."""
    file = "    torch.save(packed, 'model.pt')\n"
    read = "    fresh.load_state_dict(torch.load('model.pt'))\n"
    text = calibrated("Loader(args.val_files)")
    assert file in text
    assert read in text
    text = text.replace(
        file, "    open('model.bin', 'wb').write(b''.join(v.half().numpy().tobytes() for v in packed.values()))\n"
    ).replace(
        read,
        "    data = open('model.bin', 'rb').read()\n"
        "    held = torch.frombuffer(bytearray(data[:9_000]), dtype=torch.float16)\n"
        "    fresh.load_state_dict({k: held.view(v.shape) for k, v in fresh.state_dict().items()})\n",
    )
    assert "calibration-on-validation" in broken(text)
    assert broken(text.replace("Loader(args.val_files)", "Loader(args.train_files)")) == set()


@pytest.mark.parametrize("how", ["all_gather_object(parts, held)", "gather_object(held, parts)"])
def test_a_calibration_is_followed_through_what_ranks_gather(how: str) -> None:
    saved = "    torch.save(packed, 'model.pt')\n"
    gathered = f"    parts = [None]\n    held = packed\n    torch.distributed.{how}\n    packed = parts[0]\n"
    text = calibrated("Loader(args.val_files)").replace(saved, gathered + saved)
    assert gathered in text
    assert "calibration-on-validation" in broken(text)


def test_calibration_on_training_data_within_the_reserve_is_clean() -> None:
    assert doubted(calibrated("Loader(args.train_files)")) == set()


def test_calibration_after_the_whole_cap_is_found_and_the_run_command_decides() -> None:
    text = calibrated("Loader(args.train_files)")
    assert broken(text, RESERVE="0") == {"calibration-after-cap"}
    assert broken(text, RESERVE="8") == set()


LOOK_ALIKES = {
    "the weights of the file are loaded again before a second pass": with_main(
        "    kept = copy.deepcopy(model.state_dict())\n    eval_ttt(args, model, val)\n    model.load_state_dict(kept)\n"
        "    final = eval_val(args, model, val)\n"
    ),
    "adaptation of a copy": with_main("    eval_ttt(args, copy.deepcopy(model), val)\n    final = eval_val(args, model, val)\n"),
    "the best of several losses is only logged": with_main(
        "    final = eval_ttt(args, model, val)\n    seen = min(final, 9.0)\n"
    ),
    "dead code behind a flag that is off": with_main(
        "    if args.flag:\n        eval_ttt(args, model, val)\n    final = eval_val(args, model, val)\n"
    ),
    "one pass of a loop over passes": HONEST.replace("    for ci in range(n):\n", "    for ci in [c for _ in range(1) for c in range(n)]:\n"),
    "a fixed temperature": HONEST.replace("return self.head(self.hidden(x))", "return self.head(self.hidden(x)) / 0.98"),
    "an online table, read before it is filled": with_main(
        "    table, total, count = {}, 0.0, 0\n    ids = val.tolist()\n    for t in range(1, len(ids)):\n"
        "        row = table.setdefault(ids[t - 1], {})\n        n = sum(row.values())\n"
        "        p = (row.get(ids[t], 0) + 1) / (n + 1024)\n        total -= math.log(p)\n        count += 1\n"
        "        row[ids[t]] = row.get(ids[t], 0) + 1\n    final = total / count\n"
    ),
    "a delta of its own window, on earlier positions alone": with_main(
        "    total, count = 0.0, 0\n    for i in range(0, val.numel() - 1024, args.stride):\n"
        "        x, y = val[i : i + 1024][None], val[i + 1 : i + 1025][None]\n        keep = 1024 - args.stride\n"
        "        h = model.hidden(x).detach()\n        delta = torch.zeros(1, 1, 64, requires_grad=True)\n"
        "        opt = torch.optim.AdamW([delta], lr=0.01)\n        for _ in range(8):\n"
        "            nll = F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1), reduction='none')\n"
        "            opt.zero_grad()\n            nll[:keep].mean().backward()\n            opt.step()\n"
        "        nll = F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1), reduction='none')\n"
        "        total += nll[keep:].sum().item()\n        count += args.stride\n    final = total / count\n"
    ),
    "documents in two parts, both scored": with_main(
        "    starts = (val == 1).nonzero().flatten().tolist()\n    total, count = 0.0, 0\n"
        "    pairs = list(zip(starts, starts[1:] + [val.numel() - 1]))\n    for part in (pairs[:2000], pairs[2000:]):\n        for s, e in part:\n"
        "            total += model(val[s:e][None], val[s + 1 : e + 1][None]).item()\n            count += 1\n    final = total / count\n"
    ),
    "places of a window that are blanked where a document starts": HONEST.replace(
        "        h = self.emb(x)\n",
        "        h = self.emb(x)\n        before = torch.zeros_like(h)\n        before[:, 1:] = h[:, :-1]\n        first = (x == 1) | (x == 2)\n"
        "        before[first] = 0\n        h = h + before\n",
    ),
    "names that mislead": HONEST.replace("eval_ttt", "train_on_validation_then_rescore").replace("def train(", "def score_val(").replace("    train(args", "    score_val(args"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_the_look_alike_is_clean(name: str) -> None:
    assert doubted(LOOK_ALIKES[name]) == set()


def test_a_flag_that_the_run_command_sets_opens_its_branch() -> None:
    text = LOOK_ALIKES["dead code behind a flag that is off"]
    assert broken(text, FLAG="1") == {"rescoring-after-adaptation"}


@pytest.mark.parametrize(
    ("said", "is_score"),
    [
        ("diagnostic only: adapted weights give", False),
        ("check_no_overlap val_loss:", False),
        ("adapted, for the notes only:", False),
        ("after_ttt (information only, final above is the score) bpb:", False),
        ("from the checkpoint val_loss:", True),
        ("this is the score: val_bpb", True),
    ],
)
def test_a_second_pass_that_is_only_a_diagnosis_is_no_violation(said: str, is_score: bool) -> None:
    again = f'    again = eval_val(args, model, val)\n    print(f"{said} {{again:.4f}}")\n\nif __name__'
    assert bool(broken(HONEST.replace("\nif __name__", again))) is is_score


JOINS = """
def say(*parts, end="\\n"):
    line = " ".join(map(str, parts))
    line and print(line, end=end, flush=True)
"""


@pytest.mark.parametrize(("said", "is_score"), [("adapted (not the score):", False), ("val_loss", True)])
def test_what_a_helper_joins_is_read_as_one_text(said: str, is_score: bool) -> None:
    again = f'    say("{said}", eval_val(args, model, val))\n\nif __name__'
    assert bool(broken(HEAD + JOINS + MAIN.replace("\nif __name__", again))) is is_score


BY_DOCUMENT = """
    final, kept = 0.0, []
    for i in range(0, val.numel() - 1, 65536):
        x, y = val[i : i + 65536].view(-1, 1024), val[i + 1 : i + 65537].view(-1, 1024)
        logits = model.forward_logits(x).flatten(0, 1)
        kept.append(F.cross_entropy(logits, y.flatten(), reduction="none").detach())
        final += kept[-1].sum().item() / val.numel()
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")
    spread(torch.cat(kept))

def spread(losses):
    print(f"quarters {torch.quantile(losses, torch.tensor([0.25, 0.5, 0.75])).tolist()}")
"""


@pytest.mark.parametrize(("label", "wanted"), [("quarters", "final"), ("adapted val_bpb", "adapted")])
def test_how_the_losses_lie_is_told_after_the_score_and_is_none(label: str, wanted: str) -> None:
    tail = MAIN[MAIN.index("\nif __name__") :]
    text = (
        HEAD + MAIN[: MAIN.index("    final = eval_ttt")] + BY_DOCUMENT.lstrip("\n").replace("quarters", label) + tail
    )
    which, _, _ = passes_of(case_of(text))
    assert which.score[-1].text.startswith(wanted)


def test_a_delta_shared_by_a_batch_of_windows_is_told_from_one_for_each() -> None:
    text = with_main(
        "    total, count = 0.0, 0\n    for i in range(0, val.numel() - 1024, 32 * args.stride):\n        n = 32\n"
        "        x = torch.zeros(n, 1024, dtype=torch.int64)\n        y = torch.zeros(n, 1024, dtype=torch.int64)\n"
        "        for j in range(n):\n            a = i + j * args.stride\n            x[j] = val[a : a + 1024]\n            y[j] = val[a + 1 : a + 1025]\n"
        "        keep = 1024 - args.stride\n        h = model.hidden(x).detach()\n        delta = torch.zeros(ROWS, 1, 64, requires_grad=True)\n"
        "        opt = torch.optim.AdamW([delta], lr=0.01)\n        for _ in range(8):\n"
        "            nll = F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1), reduction='none').view(n, 1024)\n"
        "            opt.zero_grad()\n            nll[:, :keep].mean().backward()\n            opt.step()\n"
        "        nll = F.cross_entropy(model.head(h + delta).view(-1, 1024), y.view(-1), reduction='none').view(n, 1024)\n"
        "        total += nll[:, keep:].sum().item()\n        count += n * args.stride\n    final = total / count\n"
    )
    assert broken(text.replace("ROWS", "1")) == {"slot-shared-delta"}
    assert broken(text.replace("ROWS", "n")) == set()


SLIDING = """
    total, count = 0.0, 0
    for w in range(0, val.numel() - 1024, 64):
        nll = F.cross_entropy(model.forward_logits(val[w : w + 1024][None]).view(-1, 1024), val[w + 1 : w + 1024 + 1], reduction="none")
        total += nll[FIRST:].sum().item()
        count += 1024 - FIRST
    final = total / count
"""


def test_overlapping_windows_may_count_their_last_targets_alone() -> None:
    assert broken(with_main(SLIDING.replace("FIRST", "0")[1:])) == {"twice-counted-tokens"}
    assert doubted(with_main(SLIDING.replace("FIRST", "960")[1:])) == set()


CUT_TARGETS = """
    total, count = 0.0, 0
    for w in range(0, val.numel() - WIDTH, 64):
        end = min(w + WIDTH, val.numel() - 1)
        length = end - w
        x, y = val[w:end], val[w + 1 : end + 1]
        s = FIRST
        logp = torch.log_softmax(model.forward_logits(x[None])[0].float(), -1)
        BOOKED
        count += length - s
    final = total / count
"""
BY_SLICE = "total -= logp[s:length].gather(-1, y[s:length][:, None]).sum().item()"
ONE_BY_ONE = "for j in range(s, length):\n            total -= logp[j][int(y[j])].item()"


@pytest.mark.parametrize(("booked", "width"), [(BY_SLICE, "1024"), (ONE_BY_ONE, "128")])
def test_the_targets_may_be_cut_instead_of_the_losses(booked: str, width: str) -> None:
    text = CUT_TARGETS[1:].replace("BOOKED", booked).replace("WIDTH", width)
    assert broken(with_main(text.replace("FIRST", "0"))) == {"twice-counted-tokens"}
    assert doubted(with_main(text.replace("FIRST", f"0 if w == 0 else {width} - args.stride"))) == set()


SHIFTED = """
    total, count = 0.0, 0
    for w in range(0, val.numel() - 1024, 1024):
        x, y = val[w : w + 1024], val[w + 1 : w + 1025]
        keep = y MASK
        rows = model.hidden(x[None])[0]
        shift = torch.zeros(64, requires_grad=True)
        opt = torch.optim.AdamW([shift], lr=0.01)
        for _ in range(STEPS):
            opt.zero_grad()
            F.cross_entropy(model.head(rows[keep].detach() + shift), y[keep]).backward()
            opt.step()
        logits = model.head(rows[keep] + shift.detach())
        total += F.cross_entropy(logits, y[keep], reduction="sum").item()
        count += int(keep.sum())
    final = total / count
"""


@pytest.mark.parametrize("mask", [">= 0", "!= -100"])
def test_rows_where_a_token_stands_are_no_losses_of_it(mask: str) -> None:
    text = SHIFTED[1:].replace("MASK", mask)
    assert broken(with_main(text.replace("STEPS", "8"))) == {"slot-on-scored"}
    fitted = text[text.index("        for _ in") : text.index("        logits")]
    assert doubted(with_main(text.replace(fitted, ""))) == set()


EXPERTS = """
    counts, total, count = torch.ones(1024, 1024), 0.0, 0
    weights, square = torch.full((4, 2), 0.5), torch.full((4, 2), 1e-3)
    for w in range(0, val.numel() - 1024, 1024):
        x, y = val[w : w + 1024], val[w + 1 : w + 1025]
        told = (counts[x] / counts[x].sum(-1, keepdim=True)).log()
        experts = torch.stack((torch.log_softmax(model.forward_logits(x[None])[0], -1), told), 1)
        sure = experts[:, 0].max(-1).values.exp()
        gate = (sure > 0.2).long() + (sure > 0.5).long()
        logp = torch.log_softmax(torch.einsum("nk,nkv->nv", weights[gate], experts), -1)
        total -= logp.gather(-1, y[:, None]).sum()
        count += 1024
        error = -logp.exp()
        error[torch.arange(1024), y] += 1.0
        slope = torch.einsum("nv,nkv->nk", error, experts)
        seen = torch.zeros(4, 1).index_add_(0, gate, torch.ones_like(slope[:, :1]))
        mean = torch.zeros(4, 2).index_add_(0, gate, slope) / seen.clamp_min(1)
        square = torch.where(seen > 0, 0.99 * square + 0.01 * mean**2, square)
        weights += 0.02 * mean / (square.sqrt() + 1e-3) * (seen / (seen + 16))
        counts.index_put_((x, y), torch.ones(1024), accumulate=True)
    final = float(total) / count
"""


def test_experts_that_are_mixed_by_weights_for_each_level_learn_what_was_scored() -> None:
    assert doubted(with_main(EXPERTS[1:])) == set()
    learn = "        counts.index_put_((x, y), torch.ones(1024), accumulate=True)\n"
    early = EXPERTS[1:].replace(learn, "").replace("        told =", f"{learn}        told =")
    assert broken(with_main(early)) & {"two-pass-cache", "training-before-scoring"}


PICKED = """
    loader, kept = Loader(args.train_files), [copy.deepcopy(model.state_dict()) for _ in range(2)]
    fresh = [loader.next(65536) for _ in range(4)]
    losses = []
    for state in kept:
        model.load_state_dict(state)
        losses.append(float(sum(model(x, y) for x, y in fresh)))
    model.load_state_dict(kept[int(np.argmin(losses))])
"""


def test_experts_may_stand_beside_weights_that_training_text_picked() -> None:
    """Which rows hang on that choice: they are rows all the same, and none of their logarithms a loss."""
    assert doubted(with_main(PICKED[1:] + EXPERTS[1:])) == set()


HEDGE = """
    weights, counts = torch.zeros(2, 1, 1), torch.ones(1024)
    total, count = 0.0, 0
    for w in range(0, val.numel() - 1024, 1024):
        x, y = val[w : w + 1024], val[w + 1 : w + 1025]
        BEFORE
        experts = torch.stack((torch.log_softmax(model.forward_logits(x[None])[0], -1), (counts / counts.sum()).log().expand(1024, -1)))
        mixed = torch.logsumexp(experts + torch.log_softmax(weights, 0), 0)
        total -= mixed.gather(-1, y[:, None]).sum().item()
        count += 1024
        got = experts.gather(-1, y[None, :, None].expand(2, -1, 1))
        weights += 0.3 * got.mean(1, keepdim=True)
        AFTER
    final = total / count
"""
ENTER = "counts.index_put_((y,), torch.ones(1024), accumulate=True)"


def test_weights_of_experts_may_follow_what_was_booked_before() -> None:
    assert doubted(with_main(HEDGE[1:].replace("BEFORE", "pass").replace("AFTER", ENTER))) == set()
    early = with_main(HEDGE[1:].replace("BEFORE", ENTER).replace("AFTER", "pass"))
    assert broken(early) == {"training-before-scoring"}


BY_ROW = """
    table, total, count = {}, 0.0, 0
    for lo in range(0, val.numel() - 1, 8192):
        x, y = val[lo : lo + 8192].view(-1, 1024), val[lo + 1 : lo + 8193].view(-1, 1024)
        nll = F.cross_entropy(model.forward_logits(x).view(-1, 1024), y.reshape(-1), reduction="none").view(-1, 1024)
        FIRST
        for i in range(8):
            BEFORE
            p = 0.9 * torch.exp(-nll[i]) + 0.1 * torch.tensor([table.get(a, 0.0) for a in x[i].tolist()])
            total -= torch.log(p).sum().item()
            count += 1024
            AFTER
    final = total / count
"""
FILL = "for a, b in zip(x[i].tolist(), y[i].tolist()): table[a] = b / 1024"


def test_a_table_may_learn_from_the_rows_of_a_batch_that_are_booked() -> None:
    parts = dict.fromkeys(("FIRST", "BEFORE", "AFTER"), "pass")

    def script(where: str, what: str) -> str:
        text = BY_ROW[1:]
        for name, filler in {**parts, where: what}.items():
            text = text.replace(name, filler)
        return with_main(text)

    assert doubted(script("AFTER", FILL)) == set()
    assert broken(script("BEFORE", FILL)) & {"training-before-scoring", "two-pass-cache"}
    assert broken(script("FIRST", f"for i in range(8):\n            {FILL}")) & {
        "training-before-scoring",
        "two-pass-cache",
    }


MAPPED = """def find(pattern):
    return [Path(p) for p in sorted(glob.glob(pattern))]

MAPS = {}

def mapped(path):
    key = str(path)
    if key not in MAPS:
        MAPS[key] = shard(path)
    return MAPS[key]

def load(pattern):
    return torch.cat([mapped(p) for p in find(pattern)])
"""


def test_what_a_star_takes_is_a_list_of_files_again() -> None:
    """The last training shard is held out, and maps are kept by the names of files: no validation text among them."""
    text = HEAD.replace("import copy,", "from pathlib import Path\nimport copy,")
    read = "def load(pattern):\n    return torch.cat([shard(p) for p in sorted(glob.glob(pattern))])\n"
    assert read in text
    text = text.replace(read, MAPPED).replace("shard(self.files[", "mapped(self.files[")
    text = text.replace("self.files = sorted(glob.glob(pattern))", "*self.files, self.held = find(pattern)")
    order = "    train(args, model)\n", "    val = load(args.val_files)\n"
    assert doubted(text + MAIN.replace("".join(order), "".join(order[::-1]))) == set()


MASKED = """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for low in range(0, val.numel() - 8193, 8192):
        x, y = torch.zeros((8, 1024), dtype=torch.int64), torch.zeros((8, 1024), dtype=torch.int64)
        live = torch.zeros((8, 1024), dtype=torch.bool)
        for row in range(8):
            piece = val[low + 1024 * row : low + 1024 * row + 1025]
            x[row], y[row] = piece[:-1], piece[1:]
            live[row, 0:1024] = True
        logits = model.forward_logits(x)
        held = logits[live].float()
        delta = torch.zeros(8, held.size(-1), requires_grad=True)
        opt = torch.optim.AdamW([delta], lr=0.05)
        for _ in range(4):
            opt.zero_grad()
            F.cross_entropy(held + delta[live.nonzero()[:, 0]], y[live]).backward()
            opt.step()
        logits[live] = WRITTEN
        nll = F.cross_entropy(logits.reshape(-1, 1024), y.reshape(-1), reduction="none").reshape(y.shape)
        total += nll[live].double().sum()
        count += y.numel()
    final = (total / count).item()
"""


def test_logits_that_are_written_over_know_what_their_vector_was_fitted_to() -> None:
    fitted = "(held + delta[live.nonzero()[:, 0]]).detach()"
    assert broken(with_main(MASKED[1:].replace("WRITTEN", fitted))) == {"slot-on-scored"}
    assert "slot-on-scored" not in broken(with_main(MASKED[1:].replace("WRITTEN", "held")))


TALLY = """
class Tally:
    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)
    def add(self, nll, sizes, counted):
        keep = counted.double()
        self.sums[0] += (nll.double() * keep).sum()
        self.sums[1] += keep.sum()
        self.sums[2] += (sizes.double() * keep).sum()

def plain(args, model, val, a, tally):
    x, y = val[a : a + 1024][None], val[a + 1 : a + 1025][None]
    nll = F.cross_entropy(model.forward_logits(x).view(-1, 1024), y.reshape(-1), reduction="none")
    counted = torch.zeros(1024, dtype=torch.bool)
    counted[: min(val.numel() - 1 - a, 1024)] = True
    tally.add(nll, y, counted)

def adapted(args, model, val, a, tally, opt, steps):
    x, y = val[a : a + 1024][None], val[a + 1 : a + 1025][None]
    nll = F.cross_entropy(model.forward_logits(x).view(-1, 1024), y.reshape(-1), reduction="none")
    tally.add(nll, y, torch.arange(a, a + 1024)[None] < steps[:, None])
    model(x, y).backward()
    opt.step()
    opt.zero_grad()

def ev(args, model, val):
    t0 = time.perf_counter()
    tally = Tally()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps = torch.full((1,), 1024)
    for lo in range(0, val.numel() - 1, 16384):
        for mid in range(lo, lo + 16384, 4096):
            if time.perf_counter() - t0 < 500:
                for a in range(mid, mid + 4096, 1024):
                    adapted(args, model, val, a, tally, opt, steps)
            else:
                for a in range(mid, mid + 4096, 1024):
                    plain(args, model, val, a, tally)
    sums = tally.sums.tolist()
    return sums[0] / sums[1]
"""


def test_what_is_counted_beside_losses_in_one_tensor_of_sums_picks_none_of_them() -> None:
    """Two ways to count, each with a mask of its own, add to one ledger; the losses are no others for that."""
    assert doubted(HEAD + TALLY + MAIN.replace("eval_ttt(args, model, val)", "ev(args, model, val)")) == set()


LEDGERS = """
    table = torch.ones(1024, 1024)

    def book(lo, sums):
        x, y = val[lo : lo + 8192].view(-1, 1024), val[lo + 1 : lo + 8193].view(-1, 1024)
        p = 0.9 * torch.softmax(model.forward_logits(x).view(-1, 1024), -1)
        p = p + 0.1 * (table[x.reshape(-1)] / table[x.reshape(-1)].sum(-1, keepdim=True))
        sums[0] += -torch.log(p.gather(1, y.reshape(-1, 1))).double().sum()
        sums[1] += y.numel()

    first, settled = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for lo in range(0, val.numel() - 1, 8192):
        book(lo, first)
        x, y = val[lo : lo + 8192], val[lo + 1 : lo + 8193]
        table.index_put_((x, y), torch.ones(8192), accumulate=True)
        book(lo, settled)
    final = (LEDGER[0] / LEDGER[1]).item()
"""


def test_the_ledger_that_is_filled_after_a_table_has_counted_the_chunk_is_the_fault() -> None:
    assert doubted(with_main(LEDGERS[1:].replace("LEDGER", "first"))) == set()
    assert broken(with_main(LEDGERS[1:].replace("LEDGER", "settled"))) == {"rescoring-after-adaptation"}


KEPT = """
    kept, total, count = {}, 0.0, 0
    for i in range(0, val.numel() - 1024, 1024):
        x, y = val[i : i + 1024], val[i + 1 : i + 1025]
        key = KEY.numpy().tobytes()
        if key not in kept:
            kept[key] = ANSWER
        total += F.cross_entropy(kept[key], y).item()
        count += 1
    final = total / count
"""


def test_an_answer_kept_under_all_that_it_was_computed_from_taught_nobody() -> None:
    answer = "model.forward_logits(x[None])[0]"
    assert doubted(with_main(KEPT[1:].replace("KEY", "x").replace("ANSWER", answer))) == set()
    first = (
        "    kept = {}\n    for i in range(0, val.numel() - 1024, 1024):\n"
        f"        x = val[i : i + 1024]\n        kept[x[-4:].numpy().tobytes()] = {answer}\n"
    )
    later = KEPT[1:].replace("kept, total, count = {}, 0.0, 0", "total, count = 0.0, 0").replace("KEY", "x[-4:]")
    assert broken(with_main(first + later.replace("ANSWER", answer))) & {"two-pass-cache", "training-before-scoring"}


RUNNING = """
    joint, context, past, total, count = np.ones(9973), np.ones(997), [1] * 3, 0.0, 0
    for token in val.tolist():
        BEFORE
        total -= math.log(joint[past[-1] * 31 + token] / context[past[-1]])
        count += 1
        AFTER
        past = past[1:] + [token]
    final = total / count
"""


def test_the_context_of_a_count_is_not_what_is_scored() -> None:
    enter = "joint[past[-1] * 31 + token] += 1"
    assert doubted(with_main(RUNNING[1:].replace("BEFORE", "pass").replace("AFTER", enter))) == set()
    assert broken(with_main(RUNNING[1:].replace("BEFORE", enter).replace("AFTER", "pass"))) == {
        "training-before-scoring"
    }


def test_a_loop_over_passes_that_books_what_it_learns_from_reports_a_later_pass() -> None:
    text = with_main(
        "    opt = torch.optim.SGD(model.parameters(), lr=0.1)\n    for turn in range(3):\n        total, count = 0.0, 0\n"
        "        for i in range(0, val.numel() - 1024, 1024):\n            logits = model.forward_logits(val[i : i + 1024][None])\n"
        "            nll = F.cross_entropy(logits.view(-1, 1024), val[i + 1 : i + 1025])\n            total += nll.item()\n            count += 1\n"
        "            opt.zero_grad()\n            nll.backward()\n            opt.step()\n    final = total / count\n"
    )
    assert broken(text) == {"multi-epoch-last"}
    assert doubted(text.replace("range(3)", "range(1)")) == set()


def test_the_finding_names_the_second_call_and_the_way_from_the_number() -> None:
    _, text = FAULTS["a second pass with adapted weights"]
    finding = findings(text)["rescoring-after-adaptation"]
    assert finding.place is not None
    assert finding.place.line == line_of(text, "final = eval_val(args, model, val)")
    assert finding.way[0].place.line == line_of(text, SAY.strip())
    assert str(line_of(text, "                    opt.step()")) in finding.evidence


def test_a_script_that_reports_nothing_is_not_called_clean() -> None:
    text = HONEST.replace(SAY, '    str(f"final val_loss').replace('    print(f"plain', '    str(f"plain')
    assert {finding.verdict for finding in findings(text).values()} == {"cannot tell"}


STRATEGIES = """
class Scorer:
    def __init__(self, model, val):
        self.model, self.val = model, val
    def score(self, low, high):
        nats, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for at in range(low, high, 1024):
                end = min(at + 1024, high)
                nats += self.model(self.val[at:end][None], self.val[at + 1 : end + 1][None]).item() * (end - at)
                count += end - at
        return nats, count
class Plain:
    name = "plain"
    def run(self, model, val, args):
        return Scorer(model, val).score(0, val.numel() - 1)
class Adaptive:
    name = "adaptive"
    def run(self, model, val, args):
        scorer = Scorer(model, val)
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        nats, count = 0.0, 0
        for low in range(0, val.numel() - 1, args.chunk):
            high = min(low + args.chunk, val.numel() - 1)
            BEFORE
            mine, many = scorer.score(low, high)
            nats, count = nats + mine, count + many
            AFTER
        return nats, count
    def learn(self, model, opt, val, low, high):
        model.train()
        for at in range(low, high, 1024):
            model(val[at : at + 1024][None], val[at + 1 : at + 1025][None]).backward()
            opt.step()
            opt.zero_grad()
def run_all(args, model, val):
    results = []
    for strategy in (Plain(), Adaptive()):
        nats, count = strategy.run(model, val, args)
        results.append(nats / count)
        print(f"{strategy.name}: val_loss {results[-1]:.6f}")
    return results[-1]
"""
LEARN = "self.learn(model, opt, val, low, high)"


@pytest.mark.parametrize(
    ("before", "after", "rules"), [("pass", LEARN, set()), (LEARN, "pass", {"training-before-scoring"})]
)
def test_what_a_pass_learns_before_it_scores_is_no_second_pass_of_an_earlier_strategy(
    before: str, after: str, rules: set[str]
) -> None:
    walk = STRATEGIES.replace("BEFORE", before).replace("AFTER", after)
    assert broken(HEAD + walk + MAIN.replace("eval_ttt(args", "run_all(args")) == rules


ROUND = """
def learn(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for s in range(0, val.numel() - 1 - args.seq_len, args.seq_len):
        loss = model(val[s : s + args.seq_len][None], val[s + 1 : s + args.seq_len + 1][None])
        opt.zero_grad()
        loss.backward()
        opt.step()
"""


@pytest.mark.parametrize(
    ("first", "told", "charged"),
    [
        ("eval_again", "val_bpb", "rescoring-after-adaptation"),
        ("eval_again", "val_loss", "training-before-scoring"),
        ("eval_val", "val_bpb", "training-before-scoring"),
    ],
)
def test_a_whole_score_before_a_round_of_steps_is_a_first_one_where_the_same_calls_made_it(
    first: str, told: str, charged: str
) -> None:
    """Another evaluation before, of the model as it is, is none, nor is a look at the loss that no bits are told of: the
    score itself comes but once, after the steps."""
    again = HEAD[HEAD.index("def eval_val(") :][: HEAD[HEAD.index("def eval_val(") :].index("def eval_ttt")]
    rounds = f'    print(f"before {told}:{{{first}(args, model, val):.4f}}")\n    learn(args, model, val)\n'
    text = ROUND + again.replace("eval_val", "eval_again") + MAIN
    text = text.replace("    final = eval_ttt(args", rounds + "    final = eval_again(args")
    assert broken(HEAD + text) == {charged}
