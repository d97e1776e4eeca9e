"""Settings: a value is known where a default, a run command or a log says it, and UNKNOWN where nobody does."""

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.audit.commands import commands_in
from fairway.audit.settings import UNKNOWN, Settings, fold, read, truth


def folded(text: str, **names: Any) -> Any:
    def leaf(node: ast.expr) -> Any:
        return names.get(node.id, UNKNOWN) if isinstance(node, ast.Name) else UNKNOWN

    return fold(ast.parse(text, mode="eval").body, leaf)


# ---- folding


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("int('3') * 2 ** 10", 3072),
        ("bool(int('0'))", False),
        ("'A,b'.lower().split(',')", ["a", "b"]),
        ("{'x': 1}['x'] + (4, 5)[1]", 6),
        ("1 < 2 < 3 and not 0", True),
        ("f'{3}-{\"a\"}'", "3-a"),
        ("max(1, min(5, 3))", 3),
        ("'TRUE'.lower() in ('1', 'true')", True),
    ],
)
def test_constants_fold_as_python_computes_them(text: str, value: Any) -> None:
    assert folded(text) == value == eval(text)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("x or 1", True),
        ("1 or x", True),
        ("x and 0", False),
        ("0 and x", False),
        ("x and 1", None),
        ("not x", None),
        ("1 > 2 > x", False),
        ("x if x else 1", None),
        ("3 if x else 3", True),
    ],
)
def test_truth_has_three_values(text: str, held: bool | None) -> None:
    assert truth(folded(text)) is held


@pytest.mark.parametrize(
    "text",
    ["2 ** 10 ** 9", "1 << 10 ** 9", "'a' * 10 ** 9", "[0] * 10 ** 9", "1 / 0", "int('x')", "(1, 2)[5]", "len(3)"],
)
def test_what_is_too_large_or_fails_is_unknown(text: str) -> None:
    assert folded(text) is UNKNOWN


@given(st.integers(-99, 99), st.integers(-99, 99), st.sampled_from(["+", "-", "*", "//", "%", "<", "==", "and", "or"]))
def test_an_expression_of_known_names_is_pythons(a: int, b: int, sign: str) -> None:
    if b == 0 and sign in ("//", "%"):
        assert folded(f"a {sign} b", a=a, b=b) is UNKNOWN
    else:
        assert folded(f"a {sign} b", a=a, b=b) == eval(f"a {sign} b", {"a": a, "b": b})


def test_unknown_has_no_truth_of_its_own() -> None:
    with pytest.raises(TypeError, match="truth"):
        bool(UNKNOWN)


# ---- run commands

README = """
# A record

    export DATA_PATH=./data
    SEED=42 \\
      TTT_ENABLED=1 NAME="two words" torchrun --standalone --nproc_per_node=8 train_gpt.py --rate 0.1 --fast

Then `python3 prepare.py --docs 5`.
"""


def test_a_command_is_read_over_its_lines() -> None:
    (command,) = commands_in("README.md", README, "train_gpt.py")
    assert command.environment == {"DATA_PATH": "./data", "SEED": "42", "TTT_ENABLED": "1", "NAME": "two words"}
    assert command.arguments == {"rate": "0.1", "fast": True}
    assert (command.file, command.line) == ("README.md", 5)


def test_another_scripts_command_says_nothing() -> None:
    assert read("train_gpt.py", [("README.md", "A=1 python other.py")]).environ("A", "0") == "0"


@pytest.mark.parametrize(
    "text",
    [
        "env FLAG=1 python train_gpt.py",
        "FLAG=1 python3 -u records/mine/train_gpt.py",
        "run it: `FLAG=1 torchrun --nproc_per_node=8 train_gpt.py`",
        "docker run -e FLAG=1 image\nexport FLAG=1\npython train_gpt.py",
        "FLAG=1\ntorchrun train_gpt.py",
        "FLAG=${FLAG:-1} python train_gpt.py",
    ],
)
def test_the_ways_to_set_a_variable(text: str) -> None:
    assert read("train_gpt.py", [("run.sh", text)]).environ("FLAG", "0") == "1"


def test_where_commands_disagree_the_value_is_unknown() -> None:
    text = "A=1 B=2 python train_gpt.py\nA=0 B=2 python train_gpt.py\n"
    known = read("train_gpt.py", [("README.md", text)])
    assert known.environ("A", "0") is UNKNOWN
    assert known.environ("B", "0") == "2"
    assert known.environ("C", "7") == "7"
    assert known.environ("C") is UNKNOWN


def test_a_command_with_a_task_of_its_own_is_not_the_run() -> None:
    text = "python3 train_gpt.py prepare --docs all.jsonl\nWALLCLOCK=690 torchrun train_gpt.py --fast | tee log.txt\n"
    known = read("train_gpt.py", [("README.md", text)])
    assert known.environ("WALLCLOCK", "600") == "690"
    assert known.arguments == {"fast": True}
    alone = read("train_gpt.py", [("README.md", "A=1 python train_gpt.py train\nA=1 python train_gpt.py eval\n")])
    assert alone.environ("A", "0") == "1"


def test_a_shell_variable_and_a_rank_are_unknown() -> None:
    known = read("train_gpt.py", [("run.sh", "for s in 1 2; do SEED=$s python train_gpt.py; done")])
    assert known.environ("SEED", "1") is UNKNOWN
    assert known.environ("RANK", "0") is UNKNOWN
    assert Settings().argument("--val-docs", 10) == 10
    assert Settings(arguments={"val_docs": "50"}).argument("--val-docs", 10, int) == 50


# ---- logs

SCRIPT = """
import os
class H:
    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "0")))
    stride = int(os.environ.get("EVAL_STRIDE", 64))
    fast = os.getenv("FAST", "no").lower() == "true"
"""


@pytest.mark.parametrize(
    ("log", "environment"),
    [
        ("  ttt_enabled: True\n  stride: 64\n", {"TTT_ENABLED": "1"}),
        ("ttt_enabled=True fast=True stride=32", {"TTT_ENABLED": "1", "FAST": "True", "EVAL_STRIDE": "32"}),
        ("ttt_enabled: False\nstep:1 stride:1\nstep:2 stride:2\n", {}),
        ('    ttt_enabled = bool(int(os.environ.get("TTT_ENABLED", "1")))\n', {}),
    ],
    ids=["one-a-line", "many-a-line", "what-changes-is-no-setting", "source-in-the-log"],
)
def test_a_log_says_what_the_run_had(log: str, environment: dict[str, str]) -> None:
    known = read("train_gpt.py", [("train.log", log)], [ast.parse(SCRIPT)])
    assert known.environment == environment


def test_a_log_wins_over_the_readme() -> None:
    texts = [("README.md", "TTT_ENABLED=0 python train_gpt.py"), ("a.txt", "ttt_enabled: True")]
    assert read("train_gpt.py", texts, [ast.parse(SCRIPT)]).environ("TTT_ENABLED", "0") == "1"
    texts = [("README.md", "TTT_ENABLED=1 python train_gpt.py"), ("a.txt", "ttt_enabled: False")]
    assert read("train_gpt.py", texts, [ast.parse(SCRIPT)]).environ("TTT_ENABLED", "0") == "0"
