"""What a record folder claims is held against its logs and files."""

import hashlib
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from fairway.audit.case import Case
from fairway.audit.records.log import read
from fairway.audit.records.statistics import below, tail, welch
from fairway.audit.rules import (
    eval_over_time,
    foreign_artifact_or_log,
    opaque_code,
    record_figures,
    size_sum,
    subset_as_full,
    training_over_time,
    uncounted_code,
)
from fairway.audit.submission import opened
from fairway.audit.verdict import Finding, Place
from tests.audit.folders import MODEL, NATS, SCORES, SCRIPT, log, record

RULES = [
    eval_over_time,
    foreign_artifact_or_log,
    opaque_code,
    record_figures,
    size_sum,
    training_over_time,
    uncounted_code,
]


def found(rule: Any, path: Path, strict: bool = False) -> Finding:
    finding: Finding = rule.check(Case(opened(path), strict))
    return finding


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.ID)
def test_an_honest_record_is_clean_under_every_record_rule(rule: Any, tmp_path: Path) -> None:
    finding = found(rule, record(tmp_path / "honest"))
    assert (finding.verdict, finding.id) == ("clean", rule.ID), finding.evidence


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.ID)
def test_a_lone_script_is_not_drowned_in_what_cannot_be_told(rule: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    assert found(rule, tmp_path / "train.py").verdict == "clean"


def test_a_log_is_read_number_by_number() -> None:
    said = read("train_seed42.log", log(42, 1.1184, 5000, steps=6000, step_ms=99.9, eval_ms=290_000))
    assert (said.seed, said.steps, said.step_ms, said.train_seconds) == (42, 6000, 99.9, pytest.approx(599.4))
    assert said.total is not None
    assert said.total.value == MODEL + 5000
    assert [model.value for model in said.models] == [67224983, MODEL]
    assert said.final is not None
    assert said.final.bits_per_byte == 1.1184
    assert [score.seconds for score in said.scores] == [None, None, 290.0, None]
    assert said.settings["train_seq_len"] == "2048"


# Sizes.


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        ({"model": 15_999_900}, "violates", "under 16 MiB but not under 16 MB"),
        ({"model": 17_000_000}, "violates", "17,0"),
        ({"total": MODEL}, "violates", "the model alone"),
        ({"claims": {"bytes_total": MODEL}}, "suspect", "less the code's"),
        ({"claims": {"bytes_total": MODEL, "artifact_bytes": MODEL}}, "suspect", "are left out"),
        ({"claims": {"bytes_total": 15_400_000}}, "suspect", "the logs give"),
    ],
)
def test_a_size_that_is_no_sum_of_code_and_artifact(
    change: dict[str, Any], verdict: str, says: str, tmp_path: Path
) -> None:
    finding = found(size_sum, record(tmp_path / "r", **change))
    assert (finding.verdict, says in finding.evidence) == (verdict, True), finding.evidence


def test_the_files_are_weighed_not_believed(tmp_path: Path) -> None:
    folder = record(tmp_path / "r")
    with (folder / "final_model.ptz").open("wb") as file:
        file.truncate(15_999_990)  # sparse: it takes no space
    finding = found(size_sum, folder)
    assert finding.verdict == "violates"
    assert "by stat()" in finding.evidence
    assert finding.place is not None
    assert finding.place.file == "submission.json"


def test_code_counted_as_a_packed_wrapper_is_a_named_exemption(tmp_path: Path) -> None:
    script = SCRIPT + "".join(f"# a remark that packs away, number {i}\n" for i in range(2000))
    folder = record(tmp_path / "r", script, code=9000)
    kept, strict = found(size_sum, folder), found(size_sum, folder, strict=True)
    assert (kept.verdict, kept.exemption, strict.verdict) == ("clean", "packed-code-count", "violates")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("16_000_000", "16 * 1024 * 1024", "16 MiB"),
        ("16_000_000", "16 << 20", "16 MiB"),
        ("16_000_000", "int(os.environ.get('LIMIT', 16777216))", "16 MiB"),
        ('len(blob) + len(code.encode("utf-8"))', "len(blob)", "no code is added"),
    ],
)
def test_the_sum_in_the_script_itself(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.replace(old, new))
    finding = found(size_sum, path)
    assert finding.verdict == "violates"
    assert says in finding.evidence
    assert finding.place is not None
    assert finding.place.line in (5, 12, 13)  # the limit, or what is held against it


def test_what_a_function_is_handed_beside_is_no_part_of_what_it_gives(tmp_path: Path) -> None:
    """The code comes along for another purpose, and is in no artifact."""
    text = (
        "import os\ncode = open(__file__).read()\ndef packed(model, path):\n    return bytes(model)\n"
        "def save(model, path, text):\n    blob = packed(model, path)\n    total = len(blob)MORE\n"
        "    print(f'Total submission size: {total}')\n    assert total <= 16_000_000\n    return path\n"
        "model = os.urandom(9)\npath = save(model, 'm.bin', code)\nblob = packed(model, path)\n"
    )
    (tmp_path / "train.py").write_text(text.replace("MORE", ""))
    assert "no code is added" in found(size_sum, tmp_path / "train.py").evidence
    (tmp_path / "train.py").write_text(text.replace("MORE", " + len(text)"))
    assert found(size_sum, tmp_path / "train.py").verdict == "clean"


def test_a_name_is_what_its_own_function_gives_it(tmp_path: Path) -> None:
    """Another function's total counts the code, and another one's is no size."""
    text = (
        "import os\ndef saved():\n    total = os.path.getsize('m.bin')MORE\n    assert total <= 16_000_000\n"
        "def told():\n    total = len(open(__file__).read())\n    print(total)\nsaved()\ntold()\n"
    )
    (tmp_path / "train.py").write_text(text.replace("MORE", ""))
    assert "no code is added" in found(size_sum, tmp_path / "train.py").evidence
    (tmp_path / "train.py").write_text(text.replace("MORE", " + os.path.getsize(__file__)"))
    assert found(size_sum, tmp_path / "train.py").verdict == "clean"


@pytest.mark.parametrize(
    "honest",
    [
        SCRIPT.replace("LIMIT = 16_000_000", "LIMIT = 16 * 10**6"),
        SCRIPT.replace("assert total <= LIMIT", "assert len(blob) <= LIMIT - len(code)"),
        SCRIPT + "\nBUFFER = 16 * 1024 * 1024\ndef copy(a, b):\n    while x := a.read(BUFFER):\n        b.write(x)\n",
        "n = 16_000_000\nn = n - 1\nn = n - n\nprint(len(open(__file__).read()) <= n)\n",
        "import os\ndef size(p): return os.path.getsize(p)\ndef judge(n): return n <= 16_000_000\n"
        "def run(p, text):\n    n = size(p) + len(text)\n    print(judge(n))\nrun('m.bin', open(__file__).read())\n",
        *(
            "import os\nfrom dataclasses import dataclass\n@dataclass\nclass Sizes:\n    code: int\n    model: int\n"
            "    @property\n    def total(self): return self.code + self.model\n"
            f"    def fits(self): return self.total <= 16_000_000\nprint(Sizes({given}).fits())\n"
            for given in (
                "code=os.path.getsize(__file__), model=os.path.getsize('m.bin')",
                "os.path.getsize(__file__), os.path.getsize('m.bin')",
            )
        ),
    ],
)
def test_honest_sums_of_other_shapes_are_clean(honest: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(honest)
    finding = found(size_sum, tmp_path / "train.py")
    assert finding.verdict == "clean", finding.evidence


# Code outside.


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import torch\nimport helper\nhelper.go()\n", 2),
        ("from helper import go\ngo()\n", 1),
        ("def main():\n    from helper import go\n    go()\nmain()\n", 2),
        ('exec(open("helper.py").read())\n', 1),
        (
            "from pathlib import Path\nhere = Path(__file__).parent\nexec((here / 'helper.py').read_text())\n",
            3,
        ),
        ("import runpy\nrunpy.run_path('helper.py', run_name='__main__')\n", 2),
        ("import subprocess, sys\nsubprocess.run([sys.executable, 'helper.py'], check=True)\n", 2),
        ("import importlib\nm = importlib.import_module('helper')\n", 2),
    ],
)
def test_code_of_a_neighbour_is_counted_or_a_violation(text: str, line: int, tmp_path: Path) -> None:
    folder = record(tmp_path / "r", text)
    (folder / "helper.py").write_text("def go():\n    return 1\n")
    finding = found(uncounted_code, folder)
    assert finding.verdict == "violates"
    assert "helper.py (23 bytes)" in finding.evidence
    assert finding.place is not None
    assert (finding.place.file, finding.place.line) == ("train_gpt.py", line)


def test_a_neighbour_that_is_counted_is_clean(tmp_path: Path) -> None:
    text = "import helper\n"
    folder = record(tmp_path / "r", text, code=len(text) + 23)
    (folder / "helper.py").write_text("def go():\n    return 1\n")
    assert found(uncounted_code, folder).verdict == "clean"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "helper.py").write_text("def go():\n    return 1\n")
    (alone / "train_gpt.py").write_text(
        "import helper\nfrom pathlib import Path\n"
        "code = sum(len(Path(p).read_bytes()) for p in (__file__, 'helper.py'))\nprint(code)\n"
    )
    assert found(uncounted_code, alone).verdict == "clean"


def test_a_neighbour_whose_file_is_weighed_is_counted(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "train.py").write_text("import os, helper\nprint(os.path.getsize(helper.__file__))\n")
    assert found(uncounted_code, tmp_path / "train.py").verdict == "clean"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("code = Path(__file__).read_bytes() + Path('helper.py').read_bytes()\nprint(len(code))\n", "clean"),
        (
            "code, x = ''.join(Path(n).read_text() for n in (__file__, 'helper.py')), 1\nprint(len(code.encode()))\n",
            "clean",
        ),
        ("code = Path(__file__).read_bytes()\nother = Path('helper.py').read_bytes()\nprint(len(code))\n", "violates"),
        ("code = Path(__file__).read_bytes()\nprint(len(code), 'helper.py')\n", "violates"),
    ],
)
def test_a_neighbour_read_into_what_is_measured_is_counted(text: str, verdict: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "train.py").write_text(f"from pathlib import Path\nimport helper\n{text}")
    assert found(uncounted_code, tmp_path / "train.py").verdict == verdict


def test_a_kernel_in_another_language_counts_as_code(tmp_path: Path) -> None:
    text = "from torch.utils.cpp_extension import load\nk = load('k', sources=['kernels.cu'])\n"
    folder = record(tmp_path / "r", text)
    (folder / "kernels.cu").write_text("__global__ void f() {}\n")
    finding = found(uncounted_code, folder)
    assert finding.verdict == "violates"
    assert "kernels.cu" in finding.evidence


def test_code_packed_in_a_data_file_beside_the_script_is_code(tmp_path: Path) -> None:
    text = "import zlib\nexec(zlib.decompress(open('weights.dat', 'rb').read()))\n"
    folder = record(tmp_path / "r", text)
    (folder / "weights.dat").write_bytes(zlib.compress(b"print('the real script')\n"))
    finding = found(uncounted_code, folder)
    assert finding.verdict == "violates"
    assert "weights.dat" in finding.evidence


def test_an_unused_neighbour_is_no_part_of_the_submission(tmp_path: Path) -> None:
    folder = record(tmp_path / "r")
    (folder / "plot.py").write_text("import matplotlib\n")
    assert found(uncounted_code, folder).verdict == "clean"


def test_a_module_that_was_not_handed_in_is_suspect(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torch\nimport ngram_decoder_ext\n")
    assert found(uncounted_code, tmp_path / "a.py").verdict == "suspect"
    (tmp_path / "b.py").write_text("try:\n    import ngram_decoder_ext\nexcept ImportError:\n    pass\n")
    assert found(uncounted_code, tmp_path / "b.py").verdict == "clean"


# Times.


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"eval_ms": 601_000}, "violates"),
        ({"eval_ms": 553_000, "tail": ["ngram_precompute: done in 165.2s (outside timer)"]}, "violates"),
        ({"eval_ms": 410_000, "tail": ["ngram_precompute: done in 165.2s"]}, "clean"),
        ({"eval_ms": 553_000, "tail": ["gptq: 66 matrices quantized in 120.0s"]}, "clean"),
        ({"eval_ms": 553_000, "tail": ["ttt chunk 300/473 time:355.0s"]}, "clean"),
        ({"tail": ["total_eval_time: 688.0s"]}, "violates"),
        ({"tail": ["eval_total:657454ms (limit 600000ms)"]}, "violates"),
        ({"tail": ["eval_total:557454ms (limit 600000ms)"]}, "clean"),
    ],
)
def test_the_evaluation_has_600_seconds_with_what_lies_outside_its_timer(
    change: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    finding = found(eval_over_time, record(tmp_path / "r", **change))
    assert finding.verdict == verdict, finding.evidence


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("evaluation took 987.4s", "violates"),
        ("[  1816.1s] the whole evaluation took 987.4s", "violates"),
        ("evaluation took 487.4s", "clean"),
        ("phase document_ttt: took 987.4s", "clean"),
    ],
)
def test_a_log_that_ends_with_the_time_of_its_evaluation_may_say_no_score(
    said: str, verdict: str, tmp_path: Path
) -> None:
    (tmp_path / "train_gpt.py").write_text("import torch\n")
    step = "step:250/20000 train_loss:3.9127 train_time:21418ms step_avg:85.67ms"
    (tmp_path / "train_seed1337.log").write_text(f"model_params:25698896\n{step}\n{said}\n")
    assert found(eval_over_time, tmp_path).verdict == verdict


def test_how_many_chunks_were_trained_on_is_no_time_of_the_training(tmp_path: Path) -> None:
    """A line beside the score: the seconds of the evaluation, and how much of the text was adapted to."""
    (tmp_path / "train_gpt.py").write_text("import torch\n")
    score = "final val_loss:1.88310443 val_bpb:1.11527402"
    for seconds, verdict in (("913.40027", "violates"), ("513.40027", "clean")):
        said = f"ttt | chunks_trained=29411 s={seconds} cap=600.00000"
        (tmp_path / "train_seed1337.log").write_text(f"model_params:25698896\n{said}\n{score}\n")
        assert found(eval_over_time, tmp_path).verdict == verdict


def test_evaluations_whose_counting_is_unsettled_are_said_and_not_accused(tmp_path: Path) -> None:
    tail = [f"DIAGNOSTIC quantized val_loss:{1.13 * NATS:.4f} val_bpb:1.1300 eval_time:82000ms"]
    folder = record(tmp_path / "r", eval_ms=525_000, tail=tail)
    finding = found(eval_over_time, folder)
    assert finding.exemption == "diagnostics-beside-the-clock"
    assert found(eval_over_time, folder, strict=True).verdict == "violates"
    assert finding.verdict == "clean"
    assert "unsettled" in finding.evidence


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"steps": 6004, "step_ms": 99.95}, "clean"),  # 600.1 s: the step that crosses the line
        ({"steps": 6500, "step_ms": 99.9}, "violates"),
        ({"after": ["gptq: calibrated 256 batches of training data in 46.2s"]}, "violates"),
        ({"after": ["gptq:calibration on train shards took 800ms, train+gptq 600.2s of 600s"]}, "clean"),
        ({"after": ["gptq: self-generated calibration text in 197.0s"]}, "clean"),
        ({"steps": 8000, "step_ms": 99.9, "claims": {"track": "non_record_unlimited_compute"}}, "clean"),
    ],
)
def test_training_has_600_seconds_with_its_calibration(change: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    finding = found(training_over_time, record(tmp_path / "r", **change))
    assert finding.verdict == verdict, finding.evidence


# Logs of other code.


def test_a_log_with_the_source_of_another_script(tmp_path: Path) -> None:
    head = [*SCRIPT.split("\n"), "# padding", *["# more"] * 10, "=" * 100]
    assert found(foreign_artifact_or_log, record(tmp_path / "same", head=head)).verdict == "clean"
    other = [row.replace("16_000_000", "17_000_000") for row in head]
    finding = found(foreign_artifact_or_log, record(tmp_path / "other", head=other))
    assert finding.verdict == "violates"
    assert "from line 5 on" in finding.evidence


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"code": len(SCRIPT) + 36}, "bytes of code"),
        ({"head": [f"sha256 script {'ab' * 32}"]}, "sha256 abababababab"),
    ],
)
def test_a_log_whose_code_size_or_hash_is_another(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    finding = found(foreign_artifact_or_log, record(tmp_path / "r", **change))
    assert finding.verdict == "violates"
    assert says in finding.evidence


def test_a_seed_that_ran_with_another_configuration(tmp_path: Path) -> None:
    folder = record(tmp_path / "r", SCRIPT + "\ntrain_seq_len = int(os.environ.get('TRAIN_SEQ_LEN', 2048))\n")
    path = folder / "train_seed2025.log"
    path.write_text(path.read_text().replace("train_seq_len:2048", "train_seq_len:4096"))
    finding = found(foreign_artifact_or_log, folder)
    assert finding.verdict == "violates"
    assert "train_seq_len" in finding.evidence


def test_settings_are_read_beyond_the_number_of_warm_up_steps(tmp_path: Path) -> None:
    script = SCRIPT + "\nadaptation_epochs = int(os.environ.get('ADAPTATION_EPOCHS', 2))\n"
    folder = record(tmp_path / "r", script, head=["warmup_steps: 20", "adaptation_epochs: 2", "loaded_in: 4.2"])
    path = folder / "train_seed2025.log"
    path.write_text(path.read_text().replace("loaded_in: 4.2", "loaded_in: 5.1"))
    assert found(foreign_artifact_or_log, folder).verdict == "clean"  # a time that was taken is no setting
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 6"))
    finding = found(foreign_artifact_or_log, folder)
    assert finding.verdict == "violates"
    assert finding.place == Place(path.name, 2)


VARIED = """
step_count = 0
load_ms = 1000 * time.perf_counter()
base_lr = float(os.environ.get("BASE_LR", 0.02))
@dataclass
class Evaluation:
    ttt_epochs: int = 2
    use_cache: bool = False
def count():
    global step_count
    step_count += 1
"""


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        ("step_count: 11", "step_count: 12", "clean"),  # counted
        ("load_ms: 11", "load_ms: 12", "clean"),  # timed
        ("base_lr: 0.02", "base_lr: 0.020", "clean"),
        ("base_lr: 0.02", "base_lr: 2e-2", "clean"),
        ("base_lr: 0.0213", "base_lr: 0.021", "clean"),  # rounded
        ("use_cache: False", "use_cache: 0", "clean"),
        ("base_lr: 0.02", "base_lr: 0.03", "violates"),
        ("ttt_epochs: 2", "ttt_epochs: 6", "violates"),
        ("use_cache: False", "use_cache: True", "violates"),
    ],
)
def test_what_logs_print_is_compared_by_its_meaning(here: str, there: str, verdict: str, tmp_path: Path) -> None:
    folder = record(tmp_path / "r", SCRIPT + VARIED, head=[here])
    path = folder / "train_seed2025.log"
    path.write_text(path.read_text().replace(here, there))
    assert found(foreign_artifact_or_log, folder).verdict == verdict


def test_a_setting_that_a_command_gives_to_a_seed_is_no_secret(tmp_path: Path) -> None:
    folder = record(tmp_path / "r", SCRIPT + VARIED, head=["base_lr: 0.02"])
    path = folder / "train_seed2025.log"
    path.write_text(path.read_text().replace("base_lr: 0.02", "base_lr: 0.03"))
    assert found(foreign_artifact_or_log, folder).verdict == "violates"
    readme = folder / "README.md"
    said = readme.read_text() if readme.exists() else ""
    readme.write_text(said + "\n    BASE_LR=0.03 SEED=2025 torchrun --nproc_per_node=8 train_gpt.py\n")
    assert found(foreign_artifact_or_log, folder).verdict == "suspect"


def test_the_log_of_an_ablation_is_no_seed_of_the_claim(tmp_path: Path) -> None:
    folder = record(tmp_path / "r", SCRIPT + VARIED, head=["base_lr: 0.02"])
    seed = next(folder.glob("train_seed*.log"))
    other = re.sub(r"seed[:=]\s*\d+", "seed:99", seed.read_text().replace("base_lr: 0.02", "base_lr: 0.03"))
    (folder / "ablation_seed99.log").write_text(other)
    assert found(foreign_artifact_or_log, folder).verdict == "clean"


def test_what_a_library_says_of_itself_is_no_setting(tmp_path: Path) -> None:
    own = "AdamW(lr=0.02, model_dim=512, num_layers=9, mlp_mult=3, decoupled_decay=True)"
    assert found(foreign_artifact_or_log, record(tmp_path / "r", SETTINGS, head=[own])).verdict == "clean"
    dumped = own.removeprefix("AdamW")
    assert found(foreign_artifact_or_log, record(tmp_path / "s", SETTINGS, head=[dumped])).verdict == "violates"


def test_the_artifact_that_lies_here_is_one_that_a_log_made(tmp_path: Path) -> None:
    blob = b"weights" * 100
    said = f"sha256 of the artifact: {hashlib.sha256(blob).hexdigest()}"
    folder = record(tmp_path / "r", model=len(blob), tail=[said])
    (folder / "model.own").write_bytes(blob)
    assert found(foreign_artifact_or_log, folder).verdict == "clean"
    (folder / "model.own").write_bytes(b"w3ights" * 100)
    finding = found(foreign_artifact_or_log, folder)
    assert finding.verdict == "violates"
    assert "model.own" in finding.evidence


def test_rows_hashed_before_the_timer_are_part_of_the_evaluation(tmp_path: Path) -> None:
    folder = record(tmp_path / "r", eval_ms=553_400, tail=["rows of contexts hashed in 97200ms"])
    assert found(eval_over_time, folder).verdict == "violates"
    folder = record(tmp_path / "other", eval_ms=553_400, tail=["warmup and compile in 97200ms"])
    assert found(eval_over_time, folder).verdict == "clean"


# Figures.


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        ({"claims": {"val_bpb": 1.1160}}, "violates", "the logs end with"),
        ({"claims": {"val_bpb_mean": 1.1176, "val_bpb": None}}, "violates", "as the mean"),
        ({"claims": {"val_bpb_std": 0.0001}}, "violates", "a deviation of"),
        ({"claims": {"val_bpb_std": 0.0004}}, "clean", "mean 1.11800, deviation 0.00040"),
        ({"train_ms": 480_000}, "violates", "make 599.4 s, and the line says 480.0 s"),
        ({"claims": {"seed_results": {"1337": {"val_bpb": 1.1180}, "42": {"val_bpb": 1.1100}}}}, "violates", "seed 42"),
        ({"claims": {"sota_val_bpb": 1.1210, "p_value": 0.001}}, "violates", "p = 0."),
        ({"claims": {"sota_val_bpb": 1.1300, "p_value": 0.001}}, "clean", "p = "),
    ],
)
def test_figures_are_made_anew(change: dict[str, Any], verdict: str, says: str, tmp_path: Path) -> None:
    finding = found(record_figures, record(tmp_path / "r", **change))
    assert (finding.verdict, says in finding.evidence) == (verdict, True), finding.evidence


def test_seeds_without_a_log_and_logs_without_a_claim_are_suspect(tmp_path: Path) -> None:
    folder = record(tmp_path / "r")
    (folder / "train_seed42.log").unlink()
    assert "seeds 42 are claimed" in found(record_figures, folder).evidence
    folder = record(tmp_path / "more")
    (folder / "train_seed7.log").write_text(log(7, 1.1201, len(SCRIPT)))
    finding = found(record_figures, folder)
    assert finding.verdict == "suspect"
    assert "seed 7 was run" in finding.evidence


def test_a_score_whose_bytes_are_counted_otherwise_than_before_is_suspect(tmp_path: Path) -> None:
    folder = record(tmp_path / "r", claims={"val_bpb": None, "seed_results": None})
    for path in folder.glob("*.log"):
        rows = path.read_text().split("\n")
        path.write_text("\n".join([*rows[:-2], f"final_exact val_loss:{1.118 * NATS:.8f} val_bpb:0.95800000", ""]))
    finding = found(record_figures, folder)
    assert finding.verdict == "suspect"
    assert "counted otherwise" in finding.evidence


def test_claims_that_are_no_json_are_said(tmp_path: Path) -> None:
    folder = record(tmp_path / "r")
    (folder / "submission.json").write_text('{"val_bpb": 1.1,\n oops}')
    finding = found(record_figures, folder)
    assert finding.verdict == "suspect"
    assert "submission.json:2" in finding.evidence


@pytest.mark.parametrize("freedom", [1, 2, 2.7, 3, 9.4, 40])
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.3, 2.0, 6.9, 80.0])
def test_the_tail_of_student_agrees_with_scipy(t: float, freedom: float) -> None:
    assert tail(t, freedom) == pytest.approx(float(scipy.stats.t.sf(t, freedom)), rel=1e-10, abs=1e-15)


def test_both_tests_agree_with_scipy() -> None:
    ours, before = [1.1180, 1.1184, 1.1176], [1.1199, 1.1204, 1.1193, 1.1200]
    theirs = scipy.stats.ttest_1samp(ours, 1.119, alternative="less").pvalue
    assert below(ours, 1.119) == pytest.approx(float(theirs), rel=1e-9)
    shifted = [value - 0.001 for value in before]
    theirs = scipy.stats.ttest_ind(ours, shifted, equal_var=False, alternative="less").pvalue
    assert welch(ours, before, 0.001) == pytest.approx(float(theirs), rel=1e-9)


def test_the_helpers_scores_are_what_the_claims_say(tmp_path: Path) -> None:
    claims = json.loads((record(tmp_path / "r") / "submission.json").read_text())
    assert claims["val_bpb"] == round(sum(SCORES.values()) / 3, 4)


# ---- figures and settings that only the logs can tell


def test_a_deviation_without_seeds_is_that_of_the_logs(tmp_path: Path) -> None:
    one_by_one = {"seed_results": None}
    honest = record(tmp_path / "honest", claims={**one_by_one, "val_bpb_std": 0.0004})
    assert found(record_figures, honest).verdict == "clean"
    finding = found(record_figures, record(tmp_path / "small", claims={**one_by_one, "val_bpb_std": 0.00004}))
    assert finding.verdict == "violates"
    assert "0.00040" in finding.evidence
    wide = record(tmp_path / "wide", claims={**one_by_one, "val_bpb_std": 0.004})
    assert found(record_figures, wide).verdict == "suspect"


SETTINGS = (
    SCRIPT
    + """
SETTINGS = {"model_dim": 512, "num_layers": 9, "skip_ngram": False, "mlp_mult": 3}
print(SETTINGS)
"""
)
DUMPED = '{"model_dim": 512, "num_layers": 9, "skip_ngram": false, "mlp_mult": 3'


def test_a_log_prints_no_settings_that_the_script_does_not_have(tmp_path: Path) -> None:
    honest = record(tmp_path / "honest", SETTINGS, head=[DUMPED + "}"])
    assert found(foreign_artifact_or_log, honest).verdict == "clean"
    finding = found(
        foreign_artifact_or_log, record(tmp_path / "r", SETTINGS, head=[DUMPED + ', "hash_buckets": 16384}'])
    )
    assert finding.verdict == "violates"
    assert "hash_buckets" in finding.evidence
    assert finding.place is not None
    assert finding.place.line == 1


def test_words_of_other_programs_in_a_log_are_no_settings(tmp_path: Path) -> None:
    head = [
        "nccl_version: 2.21 driver_version: 550.54 cuda_runtime: 12.4 nvlink_lanes: 18 fabric_state: ok",
        "NCCL_IB_DISABLE=1 MODEL_DIM=512 NUM_LAYERS=9 SKIP_NGRAM=0 MLP_MULT=3 torchrun train_gpt.py",
    ]
    assert found(foreign_artifact_or_log, record(tmp_path / "r", SETTINGS, head=head)).verdict == "clean"


def test_a_limit_in_mib_is_found_by_its_value(tmp_path: Path) -> None:
    script = SCRIPT.replace("LIMIT = 16_000_000", "LIMIT_MB = 15.9").replace("<= LIMIT", "<= LIMIT_MB * 1024**2")
    (tmp_path / "train.py").write_text(script)
    finding = found(size_sum, tmp_path / "train.py")
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert "1024**2" in script.split("\n")[finding.place.line - 1]
    (tmp_path / "train.py").write_text(script.replace("15.9", "15.2"))  # 15,938,355 bytes
    assert found(size_sum, tmp_path / "train.py").verdict == "clean"


def test_a_limit_in_mib_is_named_where_it_is_written(tmp_path: Path) -> None:
    script = SCRIPT.replace("LIMIT = 16_000_000", "LIMIT = 16 * 2**20")
    (tmp_path / "train.py").write_text(script)
    finding = found(size_sum, tmp_path / "train.py")
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert "2**20" in script.split("\n")[finding.place.line - 1]


def test_a_limit_among_the_keys_of_a_namespace_is_that_of_its_field(tmp_path: Path) -> None:
    script = SCRIPT.replace("LIMIT = 16_000_000", "H = types.SimpleNamespace(**dict(dim=512, limit=16 << 20))")
    script = script.replace("<= LIMIT", "<= H.limit")
    (tmp_path / "train.py").write_text(script)
    finding = found(size_sum, tmp_path / "train.py")
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert "16 << 20" in script.split("\n")[finding.place.line - 1]
    (tmp_path / "train.py").write_text(script.replace("16 << 20", "16_000_000"))
    assert found(size_sum, tmp_path / "train.py").verdict == "clean"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ('log(f"for comparison: code packed {packed}, total {total / 2**20:.3f} MiB")', "clean"),
        ('log(f"total size: {size + packed}")', "violates"),
    ],
)
def test_a_packed_code_that_is_shown_beside_a_total_is_no_part_of_it(said: str, verdict: str, tmp_path: Path) -> None:
    sizes = "size = os.path.getsize(PATH)\ncode = len(open(__file__).read().encode())\ntotal = size + code\n"
    held = "if total > 16_000_000:\n    raise SystemExit('too large')\n"
    packed = "packed = len(lzma.compress(open(__file__).read().encode()))\n"
    (tmp_path / "train.py").write_text(
        f"import lzma, os\nPATH, log = 'model.bin', print\n{sizes}{packed}{said}\n{held}"
    )
    assert found(size_sum, tmp_path / "train.py").verdict == verdict


REPORT = """
import dataclasses, os
MODEL = 16_000_000 // 4
class Trainer:
    def __init__(self):
        self.model = open(__file__).read()
@dataclasses.dataclass
class Report:
    code: int
    model: int
    @property
    def total(self):
        return TOTAL
    def check(self):
        if self.total > 16_000_000:
            raise SystemExit("too large")
Report(code=os.path.getsize(__file__), model=os.path.getsize("model.bin")).check()
"""


@pytest.mark.parametrize(("total", "verdict"), [("self.code + self.model", "clean"), ("self.model", "violates")])
def test_a_field_of_a_report_is_what_its_maker_gives_it(total: str, verdict: str, tmp_path: Path) -> None:
    """Whatever else has a field of that name."""
    (tmp_path / "train.py").write_text(REPORT.replace("TOTAL", total))
    assert found(size_sum, tmp_path / "train.py").verdict == verdict


def test_a_limit_that_a_field_asks_for_is_its_default(tmp_path: Path) -> None:
    fields = (
        "@dataclasses.dataclass\nclass H:\n"
        '    limit: int = dataclasses.field(default_factory=lambda: env("SIZE_LIMIT", 16 * 2**20))\n'
    )
    script = SCRIPT.replace("LIMIT = 16_000_000", fields).replace("<= LIMIT", "<= H().limit")
    (tmp_path / "train.py").write_text(script)
    assert found(size_sum, tmp_path / "train.py").verdict == "violates"
    (tmp_path / "train.py").write_text(script.replace("16 * 2**20", "16_000_000"))
    assert found(size_sum, tmp_path / "train.py").verdict == "clean"


CLOCKED = """
import glob, os, time
import numpy as np
import torch
import torch.nn.functional as F

minutes = float(os.environ.get("MINUTES", "10"))
ttt_minutes = 10

def shards(pattern):
    for path in sorted(glob.glob(pattern)):
        yield torch.from_numpy(np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64))

net = torch.nn.Embedding(1024, 1024)
optimizer = torch.optim.Adam(net.parameters())
started = last_saved = time.perf_counter()
while (gone := time.perf_counter() - started) < 60 * minutes - 5:
    for tokens in shards("data/fineweb_train_*.bin"):
        F.cross_entropy(net(tokens[:-1]), tokens[1:]).backward()
        optimizer.step()
    if time.perf_counter() - last_saved > 1800:
        torch.save(net.state_dict(), "net.pt")
        last_saved = time.perf_counter()
"""


def test_where_no_log_times_the_training_the_scripts_clock_does(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(CLOCKED)
    assert found(training_over_time, tmp_path).verdict == "clean"
    (tmp_path / "README.md").write_text("Run: `MINUTES=15 torchrun --nproc_per_node=8 train_gpt.py`\n")
    finding = found(training_over_time, tmp_path)
    assert finding.verdict == "violates"
    assert "895 s" in finding.evidence
    assert finding.place == Place("README.md", 1)


def test_a_clock_in_milliseconds_is_read_in_its_unit(tmp_path: Path) -> None:
    script = CLOCKED.replace("(gone := time.perf_counter() - started) < 60 * minutes - 5", "{}")
    slow = script.replace("{}", "1000.0 * (time.perf_counter() - started) < 900_000")
    (tmp_path / "train_gpt.py").write_text(slow)
    assert found(training_over_time, tmp_path).verdict == "violates"
    (tmp_path / "train_gpt.py").write_text(slow.replace("900_000", "590_000"))
    assert found(training_over_time, tmp_path).verdict == "clean"


SHARES = """
import glob, math, os
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
shards = [np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(glob.glob("fineweb_val_*.bin"))]
tokens = torch.from_numpy(np.concatenate(shards).astype(np.int64))
net = torch.nn.Embedding(1024, 1024)
total, count = torch.zeros(()), torch.zeros(())
starts = list(range(0, len(tokens) - 1025, 1024))
for number, at in enumerate(starts[rank::ranks]):
    total += F.cross_entropy(net(tokens[at : at + 1024]), tokens[at + 1 : at + 1025], reduction="sum")
    count += 1024
    if number % 50 == 0:
        print(f"piece done sofar bits {(total / count).item() / math.log(2) / 2.44:.6f}")
SUM
print(f"final score bits {(total / count).item() / math.log(2) / 2.44:.8f}")
"""


def test_a_line_on_the_way_that_shows_the_claimed_number_is_not_the_score(tmp_path: Path) -> None:
    (tmp_path / "submission.json").write_text('{"val_bpb": 1.1192}')
    (tmp_path / "train_seed1.log").write_text("piece done sofar bits 1.119210\nfinal score bits 1.11920100\n")
    (tmp_path / "train_gpt.py").write_text(SHARES.replace("SUM", "dist.all_reduce(total)\ndist.all_reduce(count)"))
    assert found(subset_as_full, tmp_path).verdict == "clean"
    (tmp_path / "train_gpt.py").write_text(SHARES.replace("SUM\n", ""))
    assert found(subset_as_full, tmp_path).verdict == "violates"


def test_a_mean_over_seeds_that_only_a_line_on_the_way_comes_near_to_is_no_score_of_that_line(tmp_path: Path) -> None:
    """1.1192 is claimed, each seed's own score is another, and a sum on the way has those digits."""
    (tmp_path / "submission.json").write_text('{"val_bpb": 1.1192}')
    way = "piece done sofar bits 1.119210\npiece done sofar bits 1.118900\n"
    for seed, score in ((1, "1.11930100"), (2, "1.11910100")):
        (tmp_path / f"train_seed{seed}.log").write_text(f"{way}final score bits {score}\n")
    (tmp_path / "train_gpt.py").write_text(SHARES.replace("SUM", "dist.all_reduce(total)\ndist.all_reduce(count)"))
    assert found(subset_as_full, tmp_path).verdict == "clean"


def test_what_a_packed_script_would_weigh_is_worked_out_in_little_memory() -> None:
    """LZMA takes 94 MB at its usual dictionary of 8 MiB: beside what a trial held, twelve clean scripts of one hand had
    no verdict on their size."""
    told = (
        "import ast; from fairway.audit.worker import bound; from fairway.audit.reading.script import Script\n"
        "from fairway.audit.records.claims import Claims; from fairway.audit.records.folder import Record\n"
        "text = 'x = 1\\n' * 10_000\n"
        "record = Record(Script('train_gpt.py', text, ast.parse(text)), {}, Claims({}, ''), ())\n"
        "bound(40_000_000); print(record.packed_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert 100 < int(done.stdout) < 1_000


def test_a_file_that_is_read_where_the_artifact_is_unpacked_is_a_second_one(tmp_path: Path) -> None:
    """The artifact comes as bytes there; the path of the artifact itself, handed in, is no second file."""
    text = (
        "import io, torch, zlib\n"
        "def pack(rows, more):\n    side = io.BytesIO()\n    torch.save(more, side)\n"
        "    with open('scales.bin', 'wb') as file:\n        file.write(side.getvalue())\n"
        "    return zlib.compress(rows)\n"
        "def unpack(blob):\n    state = torch.load(io.BytesIO(zlib.decompress(blob)))\n"
        "    with open('scales.bin', 'rb') as file:\n        state.update(torch.load(io.BytesIO(file.read())))\n"
        "    return state\n"
        "def size(blob):\n    return len(blob) + len(open(__file__).read())\n"
    )
    (tmp_path / "train.py").write_text(text)
    assert "read back beside" in found(size_sum, tmp_path / "train.py").evidence
    (tmp_path / "train.py").write_text(
        text.replace("'scales.bin'", "blob").replace("pack(rows, more)", "pack(blob, more)")
    )
    assert "read back beside" not in found(size_sum, tmp_path / "train.py").evidence
