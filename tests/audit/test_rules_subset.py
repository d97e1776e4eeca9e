"""A part reported as all, and calibration that reaches the weights in other ways than by assignment."""
# ruff: noqa: E501 (examples are texts of scripts)

import pytest

from fairway.audit.trial.text import SHORT as SHORT_TEXT
from tests.audit.order import HEAD, MAIN, broken, case_of, doubted, findings, line_of

EVAL = "    final = eval_ttt(args, model, val)\n"
DOCS = """
def documents(model, val):
    starts = torch.nonzero(val == 1).flatten().tolist()
    total, count = 0.0, 0
    with torch.no_grad():
        for s, e in zip(starts, [*starts[1:], val.numel() - 1]):
BODY
    return total / count
"""
DOCUMENT = (
    "            nll = F.cross_entropy(model.forward_logits(val[s:e][None])[0], val[s + 1 : e + 1], reduction='none')\n"
)
BOOK = "            total += nll.sum().item()\n            count += e - s\n"
CHUNKS = """
def chunks(model, val):
    started = time.perf_counter()
    total, count = 0.0, 0
    with torch.no_grad():
        LOOP:
            x, y = val[s : s + 32768].view(-1, 1024), val[s + 1 : s + 32769].view(-1, 1024)
            total += model(x, y).item() * y.numel()
            count += y.numel()
AFTER    return total / count
"""


def documents(body: str) -> str:
    main = MAIN.replace(EVAL, "    final = documents(model, val)\n")
    return HEAD + DOCS.replace("BODY\n", body) + main


def chunks(loop: str, after: str = "", head: str = HEAD) -> str:
    main = MAIN.replace(EVAL, "    final = chunks(model, val)\n")
    return head + CHUNKS.replace("LOOP", loop).replace("AFTER", after) + main


RANGE = "for s in range(0, val.numel() - 32769, 32768)"
SHARE = 'for s in range(int(os.environ["RANK"]) * 32768, val.numel() - 32769, int(os.environ["WORLD_SIZE"]) * 32768)'
SUMMED = """    both = torch.tensor([total, count], device="cuda", dtype=torch.float64)
    torch.distributed.all_reduce(both)
    total, count = both.tolist()
"""
ROWS = "            rows.append(torch.stack([nll.sum(), nll.new_tensor(e - s)]))\n"
LONG = "    table = torch.stack(rows)\n    long = (table[:, 0] >= 256) & (table[:, 1] < 4096)\n"
MEAN = "(table[long, 0].sum() / table[long, 1].sum()).item()"


def tabled(then: str) -> str:
    made = documents(DOCUMENT + ROWS + BOOK).replace(
        "    total, count = 0.0, 0\n    with torch.no_grad",
        "    total, count, rows = 0.0, 0, []\n    with torch.no_grad",
    )
    return made.replace("    return total / count\n\ndef", LONG + then + "\ndef", 1)


PARTS = {
    "of all documents the long ones are told": (tabled(f"    return {MEAN}\n"), f"return {MEAN}"),
    "a rank's share": (chunks(SHARE), "total += model(x, y).item()"),
    "short documents are passed over": (documents("            if e - s < 32:\n                continue\n" + DOCUMENT + BOOK), "if e - s < 32"),
    "dear documents are left out": (documents(DOCUMENT + "            if nll.mean() > 6.0:\n                continue\n" + BOOK), "if nll.mean()"),
    "only cheap documents are booked": (
        documents(DOCUMENT + "            if nll.mean().item() <= 6.0:\n                total += nll.sum().item()\n                count += e - s\n"), "if nll.mean()",
    ),
    "every fourth document": (
        documents("            if s % 4 != 0:\n                continue\n" + DOCUMENT + BOOK), "if s % 4",
    ),
    "every fourth chunk": (chunks("for s in range(0, val.numel() - 32769, 4 * 32768)"), "for s in range(0, val.numel() - 32769, 4"),
    "a counter returns": (chunks(RANGE, "            if count > 8_000_000:\n                return total / count\n"), "return total / count\n    return"),
    "the clock leaves the outer loop through a flag": (
        HEAD + CHUNKS.replace("        LOOP:\n", "        late = False\n        for a in range(0, val.numel() - 1, 32768 * 64):\n            if late:\n                break\n            for s in range(a, a + 32768 * 64, 32768):\n")
        .replace("            x, y", "                x, y").replace("            total +=", "                total +=").replace("            count +=", "                count +=")
        .replace("AFTER", "                if time.perf_counter() - started > 500:\n                    late = True\n                    break\n")
        + MAIN.replace(EVAL, "    final = chunks(model, val)\n"),
        "break\n            for",
    ),
    "a deadline that is set before leaves the loop": (
        chunks(RANGE, "            if time.perf_counter() > deadline:\n                break\n").replace("    started = ", "    deadline = time.perf_counter() + 300.0\n    started = "),
        "break\n    return",
    ),
    "so many tokens of the one file there is": (
        chunks(RANGE, head=HEAD).replace("val = load(args.val_files)", "val = torch.cat([shard(p)[:8_000_000] for p in sorted(glob.glob(args.val_files))[:1]])"), "[:8_000_000]",
    ),
    "the first of several files": (
        chunks(RANGE, head=HEAD).replace("val = load(args.val_files)", "val = torch.cat([shard(p) for p in sorted(glob.glob(args.val_files))[:1]])"), "sorted(glob.glob(args.val_files))[:1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_reported_as_all_is_found_where_it_is_cut(name: str) -> None:
    text, piece = PARTS[name]
    found = findings(text)["subset-as-full"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, piece)


def test_every_fourth_document_is_found_by_counting() -> None:
    text = documents(DOCUMENT + BOOK).replace(
        "        for s, e in zip(starts, [*starts[1:], val.numel() - 1]):",
        "        spans = list(zip(starts, [*starts[1:], val.numel() - 1]))\n        spans = spans[:: int(os.environ.get('STEP', 4))]\n"
        "        for s, e in spans:",
    )
    found = findings(text)["subset-as-full"]
    assert found.verdict == "violates"
    assert "count nowhere in the score" in found.evidence
    assert found.place is not None
    assert found.place.line == line_of(text, "spans = spans[::")
    assert "subset-as-full" not in broken(text.replace("'STEP', 4", "'STEP', 1"))


LEARN = "            with torch.enable_grad():\n                F.cross_entropy(model.forward_logits(val[s:e][None])[0], val[s + 1 : e + 1]).backward()\n"
WHOLE = {
    "short documents are not learned from": documents(DOCUMENT + BOOK + "            if e - s < 32:\n                continue\n" + LEARN),
    "short documents have a path of their own": documents(
        "            if e - s < 32:\n    " + DOCUMENT + "                total += nll.sum().item()\n                count += e - s\n                continue\n" + DOCUMENT + BOOK
    ),
    "dear documents are listed": documents(
        DOCUMENT + "            if nll.mean() > 6.0:\n                dear.append(nll.mean().item())\n" + BOOK
    ).replace("    total, count = 0.0, 0\n    with torch.no_grad", "    total, count, dear = 0.0, 0, []\n    with torch.no_grad"),
    "what was paid so far is told now and then": documents(
        DOCUMENT + "            total -= -nll.sum()\n            count += e - s\n            if s // 50 % 2 == 0:\n                print(f'{float(total) / count + 0.0:.4f}')\n"
    ),
    "long documents are told beside all": tabled(f"    print('long documents', {MEAN})\n    return total / count\n"),
    "empty documents are passed over": documents("            if e - s < 2:\n                continue\n" + DOCUMENT + BOOK),
    "chunks one after another": chunks(RANGE),
    "late chunks are no longer learned from": chunks(
        RANGE, "            if time.perf_counter() - started > 500:\n                continue\n            model.head.weight.grad = None\n"
    ),
    "behind a deadline nothing is learned from": chunks(
        RANGE, "            if time.perf_counter() > deadline:\n                continue\n            model.head.weight.grad = None\n"
    ).replace("    started = ", "    deadline = time.perf_counter() + 300.0\n    started = "),
    "a rank takes its share, and the shares are summed": chunks(SHARE, SUMMED),
    "the bits of a token are its own": chunks(RANGE).replace(
        "total += model(x, y)", "y = sum(((y[..., None] >> torch.arange(12)) & 1)[..., b] << b for b in range(12))\n            total += model(x, y)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_booked_in_full_is_clean(name: str) -> None:
    assert doubted(WHOLE[name]) == set()


MASKED = """    used = torch.zeros(64)
    with torch.no_grad():
        for _ in range(16):
            x, y = loader.next(65536)
            used += model.hidden(x).square().mean((0, 1))
    model.head.weight.data[:, used < 1e-3] = 0
"""
TUPLES = """    used = torch.zeros(64)
    with torch.no_grad():
        for _ in range(16):
            x, y = loader.next(65536)
            used += model.hidden(x).square().mean((0, 1))
    box = {}
    for name, p in model.state_dict().items():
        if name == "head.weight":
            box[name] = (p / used.sqrt(), used.sqrt())
        else:
            box[name] = p.half()
    model.load_state_dict({k: v[0] * v[1] if isinstance(v, tuple) else v.float() for k, v in box.items()})
"""


@pytest.mark.parametrize("step", [MASKED, TUPLES], ids=["weights blanked where little passes", "scales kept in tuples"])
def test_calibration_is_dated_and_placed_by_what_it_reads(step: str) -> None:
    late = HEAD + MAIN.replace(EVAL, "    loader = Loader(args.train_files)\n" + step + EVAL)
    assert doubted(late) == set()  # twelve seconds of the clock are kept for it
    assert broken(late, RESERVE="0") == {"calibration-after-cap"}
    seen = HEAD + MAIN.replace(EVAL, "    loader = Loader(args.val_files)\n" + step + EVAL)
    assert broken(seen) == {"calibration-on-validation"}


HINTS = """
def hints_of(val):
    counts, hints = {}, torch.zeros(val.numel())
    ids = val.tolist()
    for t in range(1, len(ids)):
        FILL
    for t in range(1, len(ids)):
        hints[t] = counts.get(ids[t - 1], 0)
    return hints
def tilted(model, val):
    hints = hints_of(val)
    with open("run.log", "a") as f:
        f.write(f"hints at {(hints > 0).float().mean().item():.3%}" + "\\n")
    total, count = 0.0, 0
    with torch.no_grad():
        for s in range(0, val.numel() - 1024, 1024):
            logits = model.forward_logits(val[s : s + 1024][None])[0] + hints[s + 1 : s + 1025, None]
            total += F.cross_entropy(logits, val[s + 1 : s + 1025]).item() * 1024
            count += 1024
    return total / count
"""


def test_a_table_filled_from_the_whole_is_named_where_it_is_filled() -> None:
    main = MAIN.replace(EVAL, "    final = tilted(model, val)\n").replace(
        "    train(args, model)\n", '    train(args, model)\n    torch.save(model.state_dict(), "model.pt")\n'
    )
    text = HEAD + HINTS.replace("FILL", "counts[ids[t - 1]] = ids[t]") + main
    assert broken(text) == {"two-pass-cache"}  # a line in the log is no artifact that the table could be a part of
    found = findings(text)["two-pass-cache"].place
    assert found is not None
    assert found.line == line_of(text, "counts[ids[t - 1]] = ids[t]")


def test_a_rate_chosen_by_trials_on_validation_is_a_choice() -> None:
    body = (
        "    def trial(rate):\n        args.lr = rate\n        return eval_ttt(args, copy.deepcopy(model), val[:65537])\n"
        "    args.lr = min((5e-4, 1e-3, 2e-3), key=trial)\n"
    )
    head = HEAD.replace(
        "opt = torch.optim.SGD(model.parameters(), lr=1e-3)", "opt = torch.optim.SGD(model.parameters(), lr=args.lr)"
    )
    assert broken(head + MAIN.replace(EVAL, body + EVAL)) == {"choice-by-validation"}
    assert doubted(head + MAIN.replace(EVAL, "    args.lr = min((5e-4, 1e-3, 2e-3), key=abs)\n" + EVAL)) == set()


ONE_BY_ONE = """
def one_by_one(args, model, val):
    total, count, width = 0.0, 0, 2048
    with torch.no_grad():
        for s in range(0, val.numel() - 1, width):
            x, y = val[s : s + width][None], val[s + 1 : s + width + 1][None]
            chances = torch.softmax(model.forward_logits(x), -1)
            for j in range(min(width, val.numel() - 1 - s)):
                gold = int(FOUND)
                total -= math.log(chances[0, j, gold])
                count += 1
    return total / count
"""


def test_a_window_that_is_gone_through_target_by_target_is_no_part_of_the_text() -> None:
    main = MAIN.replace(EVAL, "    final = one_by_one(args, model, val)\n")
    assert doubted(HEAD + ONE_BY_ONE.replace("FOUND", "y[0, j]") + main) == set()
    assert "subset-as-full" in broken(HEAD + ONE_BY_ONE.replace("FOUND", "val[j + 1]") + main)


PLANNED = """
def planned(total, length, stride):
    end = min(length, total)
    windows = [(0, end, 0)]
    at = end
    while at < total:
        end = min(at + stride, total)
        windows.append((end - length, end, at))
        at = end
    return windows

def sliding(args, model, val):
    total, count = torch.zeros((), dtype=torch.float64), 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    windows = planned(val.numel() - 1, args.window, args.stride)
    windows = windows[len(windows) * rank // world : len(windows) * (rank + 1) // world]
    with torch.no_grad():
        for bi in range(0, len(windows), 8):
            batch = windows[bi : bi + 8]
            x, y = torch.zeros(8, 2048, dtype=torch.int64), torch.zeros(8, 2048, dtype=torch.int64)
            for i, (ws, we, _) in enumerate(batch):
                local = val[ws : we + 1]
                x[i, : we - ws] = local[:-1]
                y[i, : we - ws] = local[1:]
            logits = model.forward_logits(x)
            nll = F.cross_entropy(logits.view(-1, 1024), y.view(-1), reduction="none").view(8, 2048)
            for i, (ws, we, first) in enumerate(batch):
                total += nll[i, first - ws : we - ws].double().sum()
                count += we - first
    sums = torch.stack((total, torch.tensor(float(count), dtype=torch.float64)))
    torch.distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()
"""


def test_the_first_window_of_a_plan_is_no_limit() -> None:
    head = HEAD.replace("    stride = int", '    window = int(os.environ.get("WINDOW", 2048))\n    stride = int')
    body = MAIN.replace(EVAL, "    final = sliding(args, model, val)\n")
    assert broken(head + PLANNED + body) == set()


def test_every_fourth_window_of_a_plan_is_named_where_it_is_picked() -> None:
    """The list is cut into batches below: the first line that lets only a part through is meant."""
    head = HEAD.replace("    stride = int", '    window = int(os.environ.get("WINDOW", 2048))\n    stride = int')
    share = "windows = windows[len(windows) * rank // world : len(windows) * (rank + 1) // world]"
    text = (
        head + PLANNED.replace(share, share + "[::4]") + MAIN.replace(EVAL, "    final = sliding(args, model, val)\n")
    )
    found = findings(text)["subset-as-full"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, share)


HASHED = """
def by_document(args, model, val):
    starts = (val == 1).nonzero().flatten().tolist()
    spans = list(zip(starts, [*starts[1:], val.numel() - 1]))[: args.most]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin, end in spans:
        seen, last = {}, 0
        for token in val[begin:end].tolist():
            key = (last * 31 + token) % 65536
            if key in seen:
                seen[key] += 1
            else:
                seen[key] = 1
            last = token
            if len(seen) > 4000:
                seen = {}
        x, y = val[begin:end], val[begin + 1 : end + 1]
        total += F.cross_entropy(model.forward_logits(x[None])[0], y, reduction="sum").double()
        count += end - begin
    return (total / count).item()
"""


@pytest.mark.parametrize(("most", "found"), [(12_000, True), (50_000, False)])
def test_a_limit_is_seen_where_a_loop_over_tokens_makes_the_text_of_the_trial_short(most: int, found: bool) -> None:
    head = HEAD.replace("    stride = int", f'    most = int(os.environ.get("MOST", {most}))\n    stride = int')
    text = head + HASHED + MAIN.replace(EVAL, "    final = by_document(args, model, val)\n")
    assert case_of(text).trial.length == SHORT_TEXT
    assert broken(text) == ({"subset-as-full"} if found else set())


LISTED = """    chunks = [(ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)) for ci in range(n)]
    n = min(len(chunks), args.most or len(chunks))
    for ci in range(n):"""


@pytest.mark.parametrize(("most", "found"), [(400, True), (0, False)])
def test_a_limit_that_stands_before_what_there_is_otherwise(most: int, found: bool) -> None:
    head = HEAD.replace("    stride = int", f'    most = int(os.environ.get("MOST", {most}))\n    stride = int')
    head = head.replace("    for ci in range(n):", LISTED)
    text = (
        head.replace(
            "start, end = ci * args.chunk, min((ci + 1) * args.chunk, val.numel() - 1)", "start, end = chunks[ci]"
        )
        + MAIN
    )
    assert broken(text) == ({"subset-as-full"} if found else set())


BY_DOCUMENT = """
def by_document(args, model, val):
    starts = (val == 1).nonzero().flatten().tolist()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin, end in zip(starts, [*starts[1:], val.numel() - 1]):
        SHORT
        x, y = val[begin:end], val[begin + 1 : end + 1]
        total += F.cross_entropy(model.forward_logits(x[None])[0], y, reduction="sum").double()
        count += end - begin
    return (total / count).item()
"""
SHORT = {
    "left out": ("if end - begin < args.fewest:\n            continue", True),
    "said": ("if end - begin < args.fewest:\n            print(begin)", False),
    "empty": ("if end - begin < 2:\n            continue", False),
    "a number that is written elsewhere as well": (
        "if end - begin < 64:\n            continue\n        spans = list(range(begin, end, 64))",
        True,
    ),
    "too long": ("if end - begin > 9000:  # documents that nobody waits for\n            continue", True),
    "longer than anything": ("if end - begin > 1_000_000:  # no document is\n            continue", False),
    "windows": ("if end - begin > 9000:  # no window is\n            continue", False),
}


@pytest.mark.parametrize("then", ["spans.append((begin, end))", "print(begin)"])
def test_documents_that_are_long_enough_to_be_listed_are_all_that_is_scored(then: str) -> None:
    head = HEAD.replace("    stride = int", '    fewest = int(os.environ.get("FEWEST", 400))\n    stride = int')
    listed = f"if end - begin >= args.fewest:\n            {then}"
    if then == "print(begin)":
        listed += "\n        spans.append((begin, end))"
    made = BY_DOCUMENT.replace("        SHORT\n", f"        {listed}\n    for begin, end in spans:\n").replace(
        "    for begin, end in zip", "    spans = []\n    for begin, end in zip"
    )
    body = MAIN.replace(EVAL, "    final = by_document(args, model, val)\n")
    assert (broken(head + made + body) == {"subset-as-full"}) is then.startswith("spans")


@pytest.mark.parametrize("name", SHORT)
def test_documents_that_are_too_short_to_be_scored_are_left_out(name: str) -> None:
    """All documents of the trial's text have more than 400 tokens: it is tried with more than some of them have."""
    short, found = SHORT[name]
    head = HEAD.replace("    stride = int", '    fewest = int(os.environ.get("FEWEST", 400))\n    stride = int')
    body = MAIN.replace(EVAL, "    final = by_document(args, model, val)\n")
    assert (broken(head + BY_DOCUMENT.replace("SHORT", short) + body) == {"subset-as-full"}) == found


PROBE = """
def probed(args, model, val):
    starts = (val == 1).nonzero().flatten().tolist()
    long = [begin for begin, end in zip(starts, [*starts[1:], val.numel() - 1]) if end - begin > args.fewest]
    x = torch.stack([val[begin : begin + args.fewest] for begin in long])
    y = torch.stack([val[begin + 1 : begin + args.fewest + 1] for begin in long])
    return model(x, y).item()
"""


def test_documents_that_another_number_leaves_out_are_none_of_the_score() -> None:
    """The probe's number is one of the score's as well, a length of chunks: taken for more, the score is another."""
    head = HEAD.replace("    stride = int", '    fewest = int(os.environ.get("FEWEST", 400))\n    stride = int')
    score = BY_DOCUMENT.replace("        SHORT\n", "").replace("in zip(starts, [*", "in cut_up(args, starts, [*")
    cut = """
def cut_up(args, starts, ends):
    for begin, end in zip(starts, ends):
        for at in range(begin, end, args.fewest):
            if args.fewest < 4000 or begin < 8000:
                yield at, min(at + args.fewest, end)
"""
    body = MAIN.replace(EVAL, "    final = by_document(args, model, val)\n")
    body = body.replace(
        "\nif __name__", '    print(f"diag_probe (not a score) loss:{probed(args, model, val):.4f}")\n\nif __name__'
    )
    assert broken(head + cut + score + PROBE + body) == set()


STRIDE = """
def by_windows(args, model, val):
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin in range(0, val.numel() - 1, 64):
        end = min(begin + 64, val.numel() - 1)
        at, after = val[None, begin:end], val[begin + 1 : end + 1]
        total += F.cross_entropy(model.forward_logits(at)[0], after, reduction="sum").double()
        count += end - begin
        for rank in range(16):
            count += rank - rank
    return (total / count).item()
"""
HEAD_OF_IT = """    print("starts", (val == 1).nonzero().flatten().tolist()[:64])
"""


def test_a_trial_over_a_shorter_text_is_held_against_no_longer_one() -> None:
    """A stride of 64 is taken for 5, as the list's end is, and windows of 5 are too many for the whole text."""
    body = MAIN.replace(EVAL, HEAD_OF_IT + "    final = by_windows(args, model, val)\n")
    assert broken(HEAD + STRIDE + body) == set()


GROUPS = """
def grouped(model, val, most):
    windows = [(s, min(s + 64, val.numel() - 1)) for s in range(0, val.numel() - 1, 64)]
    block_windows = int(os.environ.get("BLOCK_WINDOWS", 2048))
    blocks = [windows[i : i + block_windows] for i in range(0, len(windows), block_windows)]
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks[:most]:
            for s, e in block:
                total += model(val[s:e][None], val[s + 1 : e + 1][None]).item() * (e - s)
                count += e - s
    return total / count
"""


@pytest.mark.parametrize(("most", "verdict"), [(60, "violates"), (480, "clean")])
def test_a_limit_of_blocks_that_are_larger_than_the_text_of_a_trial(most: int, verdict: str) -> None:
    """2,048 windows of 64 tokens are 131,072: the split has 473 such blocks, the text of a trial a part of one."""
    text = HEAD + GROUPS + MAIN.replace(EVAL, f"    final = grouped(model, val, {most})\n")
    assert findings(text)["subset-as-full"].verdict == verdict


@pytest.mark.parametrize(("chunk", "most"), [(131_072, 480), (32_768, 1_900), (1 << 20, 60)])
def test_a_limit_that_lets_all_chunks_of_the_split_through_is_none(chunk: int, most: int) -> None:
    """Of the 62 million tokens; the last chunk of a short text is a part of one."""
    text = (HEAD + MAIN).replace('"CHUNK", 32768', f'"CHUNK", {chunk}')
    text = text.replace("    for ci in range(n):\n", f"    for ci in range(min(n, {most})):\n")
    assert findings(text)["subset-as-full"].verdict == "clean"
    assert findings(text.replace(f"min(n, {most})", f"min(n, {most // 20})"))["subset-as-full"].verdict == "violates"


def test_a_loop_that_goes_on_in_steps_of_chunks() -> None:
    """The text of a trial has one chunk and a quarter, of which the last may be left out."""
    text = (HEAD + MAIN).replace("    for ci in range(n):\n", "    for ci in range(0, n, 4):\n")
    found = findings(text)["subset-as-full"]
    assert found.verdict == "violates"
    assert found.place is not None
    assert found.place.line == line_of(text, "for ci in range(0, n, 4)")
    assert findings(text.replace("range(0, n, 4)", "range(0, n, 1)"))["subset-as-full"].verdict == "clean"
    whole = text.replace("range(0, n, 4)", "range(n - 1)")  # without the last one, which is short
    assert findings(whole)["subset-as-full"].verdict == "clean"


BY_BYTES = """
def by_bytes(model, val, size):
    total, count, table = 0.0, 0, torch.full((256, 4), 1.0 / 256)
    with torch.no_grad():
        for s in range(0, val.numel() - 1, 1024):
            x, y = val[s : s + 1024], val[s + 1 : s + 1025]
            nll = F.cross_entropy(model.forward_logits(x[None])[0], y, reduction="none")
            n = size[y].clamp_min(1)
            PRICE
            total += nll.sum().item()
            count += y.numel()
    return total / count
"""
SPREAD = {
    "tensors": (
        "mixed = 0.8 * (-nll / n).exp()[:, None] + 0.2 * table[y % 256]; "
        "nll = torch.where(size[y] > 0, (-mixed.log() * (torch.arange(4)[None] < n[:, None])).sum(dim=1), nll)"
    ),
    "tokens": "nll = torch.tensor([-math.log(0.8 * math.exp(-each / 3) + 0.1) for each in nll.tolist()])",
}


@pytest.mark.parametrize("how", [*SPREAD])
def test_losses_that_are_spread_over_bytes_are_marked(how: str) -> None:
    """Each token has as many prices as bytes: how often a target counts does not show, and nobody is accused by it."""
    text = BY_BYTES.replace("PRICE", SPREAD[how])
    made = "    final = by_bytes(model, val, torch.tensor([1 + n % 3 for n in range(1024)]))\n"
    text = HEAD + text + MAIN.replace(EVAL, made)
    part = "mixed = 0.8" if how == "tensors" else "math.exp(-each"
    assert case_of(text).trial.bent == {line_of(text, part)}
    assert findings(text)["subset-as-full"].verdict == "clean"
    assert not case_of(HEAD + MAIN).trial.bent


@pytest.mark.parametrize(
    ("most", "found"), [("96 * ROWS", True), ("(1 << 16) + 2**15", True), ("ROWS * (val.numel() - 1)", False)]
)
def test_an_end_that_is_computed_of_numbers_is_a_limit_where_it_does_not_move_with_the_text(
    most: str, found: bool
) -> None:
    end = f"    ROWS = 1024\n    last = min(val.numel() - 1024, {most})\n    total, count"
    text = chunks("for s in range(0, last, 1024)").replace("32768, 1", "1024, 1")
    text = text.replace("s + 32768", "s + 1024").replace("s + 32769", "s + 1025")
    head, body = text.split("def chunks")
    text = f"{head}def chunks{body.replace('    total, count', end, 1)}"
    finding = findings(text)["subset-as-full"]
    assert finding.verdict == ("violates" if found else "clean")
    if found:
        assert finding.place is not None
        assert finding.place.line == line_of(text, "last = min(")
