"""Logs whose phrases nobody has met are read by words, units and sums."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fairway.audit.case import Case
from fairway.audit.records.log import read
from fairway.audit.records.numbers import numbers, step_of
from fairway.audit.rules import (
    eval_over_time,
    foreign_artifact_or_log,
    record_figures,
    size_sum,
    subset_as_full,
    training_over_time,
)
from fairway.audit.submission import opened
from fairway.audit.verdict import Finding, Place
from tests.audit.folders import SCRIPT
from tests.audit.small import line_of, verdict
from tests.audit.test_records import CLOCKED

CODE = len(SCRIPT.encode())


def free_log(**other: Any) -> str:
    """A log in a style of its own; other: steps, seconds, model, code, total, took, bits, config."""
    model, code = other.get("model", 15_100_200), other.get("code", CODE)
    config = {"seed": 5, "wide": 512, "deep": 9, "rate": 0.02, "cap": 30.0, "keep": 10, "word": "on"} | other.get(
        "config", {}
    )
    return "\n".join(
        (
            f"options {json.dumps(config)}",
            "upd 0 held-out 6.93 nats",
            "update 1000 nll 2.4101 [90.0s, 90.00ms/update]",
            "update 4000 nll 2.1101 [360.0s, 90.00ms/update]",
            f"{other.get('steps', 6500)} updates in {other.get('seconds', 585.0)}s of 600s",
            f"parcel: weights {model} + script {code} = {other.get('total', model + code)} bytes of 16000000",
            f"grading: {other.get('took', 410.2)}s of 600s",
            f"REPORT nll 1.9512 bpb {other.get('bits', 1.1555)} targets 62021845",
        )
    )


def folder(root: Path, claims: dict[str, Any] | None = None, script: str = SCRIPT, **other: Any) -> Path:
    root.mkdir(parents=True)
    (root / "train_gpt.py").write_text(script)
    (root / "run.out").write_text(free_log(**other))
    table = {"val_bpb": 1.1555, "bytes_total": 15_100_200 + CODE} | (claims or {})
    (root / "submission.json").write_text(json.dumps(table, indent=1))
    return root


def found(rule: Any, path: Path) -> Finding:
    finding: Finding = rule.check(Case(opened(path)))
    return finding


@pytest.mark.parametrize(
    ("row", "steps", "seconds", "each"),
    [
        ("it 6000 loss 2.0046 clock 522.9s 87.15ms/it", 6000, 522.9, 87.15),
        ("step:13780/20000 train_time:600012ms step_avg:43.54ms", 13780, 600.012, 43.54),
        ("[step 100/20000] loss 3.1 (12.3 s elapsed, 87.2 ms/step)", 100, 12.3, 87.2),
        ("4500/20000 train_loss: 2.3 train_time: 10.0m tok/s: 7600000", 4500, 600.0, None),
        ('{"step": 6000, "time_s": 523.1, "loss": 2.1}', 6000, 523.1, None),
        ("6712 steps, 589.8s of 600s", 6712, 589.8, None),
    ],
)
def test_a_line_says_what_its_numbers_are(row: str, steps: int, seconds: float, each: float | None) -> None:
    read_ = numbers(row)
    step = step_of(read_)
    assert step is not None
    assert step.value == steps
    times = [one.seconds for one in read_ if one.seconds is not None and not one.is_rate]
    assert times == [pytest.approx(seconds)]
    rates = [one.rate_ms for one in read_ if one.rate_ms is not None]
    assert rates == ([] if each is None else [pytest.approx(each)])


@pytest.mark.parametrize(
    "row", ["warmup_step:20/20 12.0s", '{"tokens_per_step": 786432, "seconds": 600.0}', "iters: 20000"]
)
def test_what_is_counted_besides_is_no_step_of_the_training(row: str) -> None:
    assert step_of(numbers(row)) is None


def test_a_log_of_its_own_style_is_read_number_by_number() -> None:
    said = read("run.out", free_log())
    assert (said.seed, said.steps, said.train_seconds) == (5, 6500, 585.0)
    assert [amount[-1].value for amount in (said.models, said.codes)] == [15_100_200, CODE]
    assert said.total is not None
    assert said.total.value == 15_100_200 + CODE
    assert said.final is not None
    assert (said.final.bits_per_byte, said.final.nats_per_token) == (1.1555, 1.9512)
    assert said.settings["rate"] == "0.02"


@pytest.mark.parametrize(
    "text",
    ["", "{" * 3000, "step " * 2000 + "9" * 5000, "\0" * 99, "it 1e999999 bpb 1e400 3 s", "9" * 400 + " bytes total 5"],
    ids=["empty", "brackets", "long", "noughts", "infinite", "digits"],
)
def test_noise_is_read_as_nothing(text: str) -> None:
    said = read("noise.log", text)
    assert (said.steps, said.scores, said.totals) == (None, (), ())


@pytest.mark.parametrize(
    "rule", [eval_over_time, foreign_artifact_or_log, record_figures, size_sum, training_over_time], ids=lambda r: r.ID
)
def test_an_honest_log_of_its_own_style_is_clean(rule: Any, tmp_path: Path) -> None:
    finding = found(rule, folder(tmp_path / "honest"))
    assert finding.verdict == "clean", finding.evidence
    assert "open: no log" not in finding.evidence


@pytest.mark.parametrize(
    ("rule", "change", "line"),
    [
        (eval_over_time, {"took": 640.2}, 7),
        (training_over_time, {"steps": 7000, "seconds": 630.0}, 5),
        (record_figures, {"steps": 9500}, 5),
        (size_sum, {"model": 16_100_200}, 6),
        (foreign_artifact_or_log, {"code": CODE + 900}, 6),
    ],
    ids=lambda each: getattr(each, "ID", ""),
)
def test_what_a_log_of_its_own_style_tells_against_the_record(
    rule: Any, change: dict[str, Any], line: int, tmp_path: Path
) -> None:
    finding = found(rule, folder(tmp_path / "fault", **change))
    assert (finding.verdict, finding.place) == ("violates", Place("run.out", line)), finding.evidence


def test_a_claim_is_named_by_its_line(tmp_path: Path) -> None:
    finding = found(record_figures, folder(tmp_path / "fault", {"val_bpb": 1.1499}))
    assert (finding.verdict, finding.place) == ("violates", Place("submission.json", 2))


@pytest.mark.parametrize(
    ("counts", "figures", "subset"),
    [
        ("targets 62021845 bytes 151080891", "clean", False),
        ("targets 62021845 bytes 145080891", "violates", False),
        ("targets 12404369 bytes 30216178", "clean", True),
        ("targets 7752730 bytes 18885111", "clean", False),
    ],
    ids=["all of them", "counts that do not make the score", "a fifth of them", "one rank's share"],
)
def test_what_was_counted_beside_a_score(counts: str, figures: str, subset: bool, tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    text = (at / "run.out").read_text().replace("targets 62021845", counts)
    (at / "run.out").write_text(text)
    assert found(record_figures, at).verdict == figures
    assert (found(subset_as_full, at).verdict == "violates") == subset  # else it tells that the script scores nothing


@pytest.mark.parametrize(("size", "subset"), [(15_100_200 + CODE, False), (15_000_000, True)])
def test_bytes_of_what_is_handed_in_are_not_those_that_were_scored(size: int, subset: bool, tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    text = (at / "run.out").read_text()
    (at / "run.out").write_text(text.replace("targets 62021845", f"bytes {size}"))
    assert (found(subset_as_full, at).verdict == "violates") == subset


@pytest.mark.parametrize("stamp", ["[  1096.8s] ", "[2026-03-30 12:01:07,513] "])
def test_the_time_in_front_of_a_line_is_no_figure_of_it(stamp: str, tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    text = (at / "run.out").read_text()
    (at / "run.out").write_text("".join(f"{stamp}{row}\n" for row in text.split("\n")))
    for rule in (record_figures, size_sum, eval_over_time, training_over_time):
        assert found(rule, at).verdict == "clean", rule


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ("| 5 | 6500 | 1.15550 |", "clean"),
        ("| 5 | 1.9512 | **1.1555** |", "clean"),
        ("| 5 | 1.1501 | 15.1 MB |", "violates"),
        ("| 6 | 1.1501 |", "clean"),
        ("5 of 6 runs gave 1.1501", "clean"),
    ],
)
def test_a_seeds_row_in_the_readme_is_what_its_log_prints(row: str, verdict: str, tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    (at / "README.md").write_text(f"# Run\n\n| seed | score |\n|---|---|\n{row}\n")
    finding = found(record_figures, at)
    assert (finding.verdict, finding.place) == (verdict, Place("README.md", 5) if verdict == "violates" else None)


@pytest.mark.parametrize(
    ("digits", "verdict"),
    [(hashlib.sha256(SCRIPT.encode()).hexdigest()[:16], "clean"), ("0123456789abcdef", "violates")],
    ids=["the script's", "another's"],
)
def test_the_first_digits_of_a_hash_name_the_script(digits: str, verdict: str, tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    (at / "run.out").write_text((at / "run.out").read_text() + f"\nsha256 model fedcba9876543210 code {digits}\n")
    finding = found(foreign_artifact_or_log, at)
    assert (finding.verdict, finding.place) == (verdict, Place("run.out", 9) if verdict == "violates" else None)


def test_a_table_of_other_things_than_seeds_is_none_of_scores(tmp_path: Path) -> None:
    at = folder(tmp_path / "it")
    (at / "README.md").write_text("| layers | score |\n|---|---|\n| 5 | 1.1501 |\n")
    assert found(record_figures, at).verdict == "clean"


TABLE = """
OPTIONS = {"wide": 512, "deep": 9, "rate": 0.02, "cap": 30.0, "keep": 10, "word": "on", "seed": 5}
"""


@pytest.mark.parametrize(
    ("readme", "verdict"),
    [
        ("Run: `torchrun train_gpt.py --seed 5`", "violates"),
        ("Run: `torchrun train_gpt.py --seed 5 --wide 640`", "clean"),
        ("Run: `torchrun train_gpt.py --seed 5`, with wide at 640", "clean"),
        ("Run: `torchrun train_gpt.py --seed 5 --options wide.yaml`", "clean"),
        ("No command is given.", "clean"),
    ],
    ids=["said by nobody", "said by the command", "told in words", "a file", "no command"],
)
def test_settings_that_the_logs_have_of_nobody(readme: str, verdict: str, tmp_path: Path) -> None:
    script = SCRIPT + TABLE
    at = folder(tmp_path / "it", script=script, code=len(script.encode()), config={"wide": 640})
    (at / "README.md").write_text(readme + "\n")
    finding = found(foreign_artifact_or_log, at)
    assert finding.verdict == verdict, finding.evidence
    assert finding.place == (Place("run.out", 1) if verdict == "violates" else None)


def test_a_value_that_a_text_of_the_script_lays_over_the_defaults_is_its_own(tmp_path: Path) -> None:
    script = SCRIPT + TABLE + "LAID_OVER = '{\"wide\": 640}'\n"
    at = folder(tmp_path / "it", script=script, code=len(script.encode()), config={"wide": 640})
    (at / "README.md").write_text("Run: `torchrun train_gpt.py --seed 5`\n")
    assert found(foreign_artifact_or_log, at).verdict == "clean"


def test_two_logs_of_one_seed_are_not_of_two(tmp_path: Path) -> None:
    at = folder(tmp_path / "it", {"seeds": [5, 6]})
    (at / "run.out").rename(at / "run_5.out")
    (at / "run_6.out").write_text(free_log(config={"seed": 6}))
    assert found(foreign_artifact_or_log, at).verdict == "clean"
    (at / "run_6.out").write_text(free_log(bits=1.1557))
    finding = found(foreign_artifact_or_log, at)
    assert (finding.verdict, finding.place) == ("violates", Place("run_6.out", 1))


def test_a_setting_of_a_table_that_differs_between_seeds(tmp_path: Path) -> None:
    at = folder(tmp_path / "it", script=SCRIPT + TABLE, code=len((SCRIPT + TABLE).encode()))
    other = free_log(config={"seed": 6, "keep": 12}, code=len((SCRIPT + TABLE).encode()))
    (at / "second.out").write_text(other)
    finding = found(foreign_artifact_or_log, at)
    assert (finding.verdict, finding.place) == ("violates", Place("second.out", 1))
    assert "keep = 12" in finding.evidence


@pytest.mark.parametrize(
    ("claims", "size", "verdict"),
    [
        ({}, 15_100_200, "clean"),
        ({}, 15_600_200, "violates"),
        ({"bytes_total": 14_900_000}, 15_100_200, "violates"),
        ({"bytes_total": 15_100_200, "bytes_model": 15_100_200, "bytes_code": CODE}, None, "violates"),
        ({"bytes_total": 15_100_200 + CODE, "artifact_bytes": 15_100_200 + CODE, "bytes_code": CODE}, None, "clean"),
    ],
    ids=[
        "as told",
        "larger than any log says",
        "a claim below the files",
        "a claim without its code",
        "all is called artifact",
    ],
)
def test_claims_are_held_against_files_and_parts(
    claims: dict[str, Any], size: int | None, verdict: str, tmp_path: Path
) -> None:
    at = folder(tmp_path / "it", claims)
    if size is not None:
        with (at / "weights.parcel").open("wb") as file:
            file.truncate(size)
    finding = found(size_sum, at)
    assert finding.verdict == verdict, finding.evidence


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("LIMIT = 16_000_000", 'LIMIT = dict(most=16_000_000)["most"]', "clean"),
        ("assert total <= LIMIT", 'assert total <= OPTIONS["most"]', "violates"),
        ('len(code.encode("utf-8"))', "len(zlib.compress(code.encode()))", "violates"),
        ('len(code.encode("utf-8"))', "len(compress_blob(code.encode()))", "violates"),
        (
            "    total = len(blob)",
            "    def packed(code): return len(zlib.compress(code.encode()))\n    less = packed(code)\n    total = less",
            "violates",
        ),
        ('len(code.encode("utf-8"))', "len(base64.b85encode(zlib.compress(code.encode())))", "clean"),
        ('+ len(code.encode("utf-8"))', "+ len(Path(sys.argv[1]).read_bytes())", "clean"),
        (
            "assert total <= LIMIT",
            'print(f"{len(zlib.compress(code.encode()))} packed"); assert total <= LIMIT',
            "clean",
        ),
        (
            "assert total <= LIMIT",
            'less = len(zlib.compress(code.encode())); print(f"({less + len(blob)} if packed)"); assert total <= LIMIT',
            "clean",
        ),
        (
            "assert total <= LIMIT",
            'less = len(zlib.compress(code.encode())); print(f"total {less + len(blob)}"); assert total <= LIMIT',
            "violates",
        ),
    ],
    ids=[
        "a dict's entry",
        "MiB in a table",
        "the code compressed",
        "by a helper",
        "handed on by its name",
        "a wrapper of it",
        "another file",
        "only shown",
        "only shown by its name",
        "shown as the total",
    ],
)
def test_what_the_sum_is_made_of(old: str, new: str, verdict: str, tmp_path: Path) -> None:
    assert old in SCRIPT
    table = 'OPTIONS = {"most": 16 * 1024 * 1024}\n'
    (tmp_path / "train_gpt.py").write_text(SCRIPT.replace(old, new).replace("LIMIT =", table + "LIMIT ="))
    finding = found(size_sum, tmp_path)
    assert finding.verdict == verdict, finding.evidence


EXAMINED = """
held = next(shards("data/fineweb_val_*.bin"))
WATCH
with torch.no_grad():
    for at in range(0, len(held) - 1, 1024):
        nll = F.cross_entropy(net(held[at : at + 1024]), held[at + 1 : at + 1025])
assert time.perf_counter() - begun < float(os.environ.get("EXAM", "590")), "too slow"
"""


@pytest.mark.parametrize(
    ("watch", "setting", "verdict"),
    [
        ("begun = time.perf_counter()", "", "clean"),
        ("begun = time.perf_counter()", "EXAM=900 ", "violates"),
        ("begun = started", "EXAM=1150 ", "clean"),
        ("begun = time.perf_counter()", "EXAM=7200 ", "clean"),
    ],
    ids=["within the limit", "over it", "a clock of the whole run", "a watch for a hang"],
)
def test_where_no_log_times_the_evaluation_the_scripts_clock_does(
    watch: str, setting: str, verdict: str, tmp_path: Path
) -> None:
    (tmp_path / "train_gpt.py").write_text(CLOCKED + EXAMINED.replace("WATCH", watch))
    (tmp_path / "README.md").write_text(f"Run: `{setting}torchrun --nproc_per_node=8 train_gpt.py`\n")
    assert found(eval_over_time, tmp_path).verdict == verdict


def test_a_time_that_all_ranks_share_in_a_tensor_is_a_clock(tmp_path: Path) -> None:
    shared = (
        "    used = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)\n    steps = used.item() > LIMIT\n"
    )
    text = EXAMINED.replace("WATCH", "begun = time.perf_counter()").replace("    for at", shared + "    for at")
    for limit, wanted in (("1140.0", "violates"), ("560.0", "clean")):
        (tmp_path / "train_gpt.py").write_text(CLOCKED + text.replace("LIMIT", limit))
        assert found(eval_over_time, tmp_path).verdict == wanted


@pytest.mark.parametrize("taken", ["{}.backward()", "taken = torch.autograd.grad({}, list(net.parameters()))"])
@pytest.mark.parametrize(("limit", "verdict"), [(900.0, "violates"), (570.0, "clean")])
def test_a_limit_less_something_for_each_batch_that_is_left_is_the_limit(
    limit: float, verdict: str, taken: str, tmp_path: Path
) -> None:
    text = EXAMINED.replace("WATCH", "begun, batches = time.perf_counter(), list(range(0, len(held) - 1, 1024))")
    text = text.replace("for at in range(0, len(held) - 1, 1024):", "for i, at in enumerate(batches):")
    looked = f"        live = time.perf_counter() - begun < {limit} - 0.15 * (len(batches) - i)\n"
    text = text[: text.index("assert")].replace("        nll", f"{looked}        nll")
    loss = "F.cross_entropy(net(tokens[:-1]), tokens[1:])"
    (tmp_path / "train_gpt.py").write_text(CLOCKED.replace(f"{loss}.backward()", taken.format(loss)) + text)
    assert found(eval_over_time, tmp_path).verdict == verdict


@pytest.mark.parametrize(("limit", "verdict"), [(1500.0, "violates"), (640.0, "clean"), (7200.0, "clean")])
def test_a_deadline_is_a_clock_as_well(limit: float, verdict: str, tmp_path: Path) -> None:
    """The clock against its start and numbers: 45 s are kept back."""
    text = EXAMINED.replace("WATCH", f"begun = time.perf_counter()\nuntil = begun + {limit} - 45.0")
    text = text.replace("    for at", "    steps = 8 if time.perf_counter() < until else 0\n    for at")
    text = text.replace('assert time.perf_counter() - begun < float(os.environ.get("EXAM", "590")), "too slow"\n', "")
    (tmp_path / "train_gpt.py").write_text(CLOCKED + text)
    finding = found(eval_over_time, tmp_path)
    assert finding.verdict == verdict
    if verdict == "violates":
        assert finding.place is not None
        assert f"begun + {limit}" in (CLOCKED + text).split("\n")[finding.place.line - 1]


TOLD = [
    ("Training and export take 597 s. Evaluation takes 803 s with six phases.", True),
    ("Training stops at 578 s. The sliding evaluation with stride 4 took 1,487 s on the same eight H100s.", True),
    ("The evaluation with training and export took 1,487 s.", False),
    ("Six phases of adaptation, each with a step for every row. The whole evaluation\ntook 803 s.", True),
    ("Six phases of adaptation, each with a step for every row of the evaluation.\nExport 803 s.", False),
    ("# Windows side by side, eight phases, and an evaluation of whole documents\n803 s", False),
    ("On 8xH100: training 599 s, plain sliding windows 104 s, SLOT (96 steps, stride 32) 1,331 s.", True),
    ("- **Test-time training**: 21 minutes", True),
    ("Score-first TTT (eight epochs, 32K chunks) took 710.5 seconds on 8xH100", True),
    ("| stage | time |\n|---|---|\n| training | 599 s |\n| whole evaluation | 1,187 s |", True),
    ("| seed | bpb | train | eval |\n|---|---|---|---|\n| 1337 | 1.0693 | 596.2 s | 841.7 s |", True),
    ("The whole evaluation, from reading the artifact to the last chunk, takes about 11 minutes (662 s).", True),
    ("Training takes 662 s from the first step, all that is read counted, on 8xH100; evaluation 410 s.", False),
    ("Hints are built in 196 s, before the evaluation clock; the timed evaluation (tilt, TTT) then takes 569 s.", True),
    ("Hints are built in 20 s, before the evaluation clock; the timed evaluation then takes 569 s.", False),
    ("The packing takes 96 s, before the training clock ends; the evaluation takes 569 s.", False),
    ("Evaluation takes 430 s.", False),
    ("Evaluation must end after 900 s, which is a limit of the machine. Evaluation limit 900 s.", False),
    ("Training took 640 s, evaluation 410 s.", False),
    ("Earlier the evaluation took 803 s, so the stride is 64 now.", False),
    ("On one H100 the evaluation takes 2,870 s.", False),
    ("With stride 16 the evaluation would take 1,640 s.", False),
    ("| run | train | eval |\n|---|---|---|\n| baseline | 599 s | 803 s |", False),
    ("| stage | limit of eval |\n|---|---|\n| all | 900 s |", False),
    ("Evaluation scores 1,331 windows and 803 documents.", False),
]


@pytest.mark.parametrize(("readme", "over"), TOLD)
def test_where_neither_log_nor_clock_does_the_readme_does(readme: str, over: bool, tmp_path: Path) -> None:
    """What an author says of his own evaluation; of a limit, another machine or what was tried before is none."""
    (tmp_path / "train_gpt.py").write_text(CLOCKED)
    (tmp_path / "README.md").write_text(f"# A record\n\n{readme}\n")
    finding = found(eval_over_time, tmp_path)
    assert finding.verdict == ("violates" if over else "clean"), finding.evidence
    if over:
        assert finding.place == Place("README.md", 2 + len(readme.split("\n")))


SAVED = """
import io, os, zlib
from pathlib import Path
import torch

def save(state):
    rest = {k: state.pop(k) for k in list(state) if k.endswith("scale")}
    SECOND
    blob = zlib.compress(pickled(state))
    Path("model.bin").write_bytes(blob)
    total = len(blob) + len(open(__file__, "rb").read()) MORE
    if total > 16_000_000:
        raise RuntimeError(total)

def revive():
    state = unpickled(zlib.decompress(Path("model.bin").read_bytes()))
    state.update(READ)
    return state
"""
SECOND_FILES = {
    "bytes": ('Path("rest.bin").write_bytes(pickled(rest))', 'unpickled(Path("rest.bin").read_bytes())'),
    "torch": ('torch.save(rest, "rest.bin")', 'torch.load("rest.bin")'),
    "opened": ('open("rest.bin", "wb").write(pickled(rest))', 'unpickled(open("rest.bin", "rb").read())'),
}


WRITTEN = ('Path("model.bin").write_bytes(blob)', 'with open("model.bin", "wb") as file: file.write(blob)')


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("way", SECOND_FILES)
@pytest.mark.parametrize(
    ("more", "wanted"),
    [("", "violates"), ('+ os.path.getsize("rest.bin")', "clean"), ('+ Path("rest.bin").stat().st_size', "clean")],
)
def test_a_second_file_that_is_read_back_is_counted(
    tmp_path: Path, written: str, way: str, more: str, wanted: str
) -> None:
    second, read = SECOND_FILES[way]
    text = SAVED.replace("SECOND", second).replace("READ", read).replace(" MORE", f" {more}")
    text = text.replace(WRITTEN[0], written)
    found = verdict(tmp_path, "size_sum", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert found.place.line == line_of(text, second)


@pytest.mark.parametrize(
    ("second", "wanted"), [('put("model.bin.rest", rest)', "violates"), ('more = put("model.bin.rest", rest)', "clean")]
)
def test_a_second_file_that_a_helper_writes_is_counted_as_well(tmp_path: Path, second: str, wanted: str) -> None:
    """Who asks what was written counts it."""
    helpers = """
def put(path, state):
    blob = zlib.compress(pickled(state))
    Path(path).write_bytes(blob)
    return len(blob)

def got(path):
    return unpickled(zlib.decompress(Path(path).read_bytes()))
"""
    text = SAVED.replace("SECOND", second).replace("READ", 'got("model.bin.rest")').replace(" MORE", "") + helpers
    text = text.replace('Path("model.bin").write_bytes(blob)', 'size = put("model.bin", state)')
    found = verdict(tmp_path, "size_sum", text.replace("total = len(blob)", "total = size"))
    assert found.verdict == wanted, found.evidence


@pytest.mark.parametrize(("total", "wanted"), [("max(model, code)", "violates"), ("max(model, 0) + code", "clean")])
def test_the_larger_of_code_and_artifact_is_no_sum(tmp_path: Path, total: str, wanted: str) -> None:
    text = f"""
import os
model, code = os.path.getsize("model.bin"), os.path.getsize(__file__)
total = {total}
assert total < 16_000_000
"""
    found = verdict(tmp_path, "size_sum", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert found.place.line == line_of(text, "total = ")


@pytest.mark.parametrize(("more", "wanted"), [("", "violates"), (" + os.path.getsize(__file__)", "clean")])
def test_a_field_that_is_called_like_what_measures_is_no_part_of_a_size(tmp_path: Path, more: str, wanted: str) -> None:
    text = f"""
import os
class Loader:
    def __init__(self):
        self.len = os.path.getsize(__file__)
blob = open("model.bin", "rb").read()
total = len(blob){more}
assert total < 16_000_000
"""
    assert verdict(tmp_path, "size_sum", text).verdict == wanted


def test_a_file_that_nobody_reads_back_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    text = SAVED.replace("SECOND", 'torch.save(rest, "rest.bin")').replace("READ", "{}").replace(" MORE", "")
    assert verdict(tmp_path, "size_sum", text).verdict == "clean"


def test_a_checkpoint_that_the_training_reads_back_is_none(tmp_path: Path) -> None:
    text = """
import os, torch
torch.save(model.state_dict(), "best.pt")
model.load_state_dict(torch.load("best.pt"))
torch.save(packed(model), "model.pt")
total = os.path.getsize("model.pt") + os.path.getsize(__file__)
assert total < 16_000_000
model = unpacked(torch.load("model.pt"))
"""
    assert verdict(tmp_path, "size_sum", text).verdict == "clean"
