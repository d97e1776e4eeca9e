"""What a command or a log says of a table of settings is what the script ran with."""

import ast
import json

import pytest

from fairway.audit.told import settle

OPTIONS = """
import os
O = dict(data="./d", wide=512, deep=9, keep=11.0, clock=600.0, word="on", seed=1)
for key, value in list(O.items()):
    text = os.environ.get("XY_" + key.upper())
    if text is not None:
        O[key] = type(value)(text)
"""
PARTS = """
from dataclasses import dataclass, field
@dataclass
class Grades:
    stride: int = 64
    rank: int = 8
    seconds: float = 600.0
    alpha: float = 1.0
    name: str = "walk"
    flag: bool = False
@dataclass
class Lessons:
    steps: int = 20000
    seconds: float = 600.0
    rate: float = 0.02
    decay: float = 0.1
    warm: int = 20
    clip: float = 1.0
@dataclass
class Job:
    grades: Grades = field(default_factory=Grades)
    lessons: Lessons = field(default_factory=Lessons)
"""


def run(text: str, readme: str = "", **logs: str) -> tuple[str, list[tuple[str, object, object]]]:
    tree = ast.parse(text)
    told = settle([tree], "train_gpt.py", [("README.md", readme)], logs)
    return ast.unparse(tree), [(each.name, each.default, each.value) for each in told]


def test_a_variable_whose_name_is_put_together_sets_an_option() -> None:
    text, told = run(OPTIONS, "```\nXY_SEED=7 XY_CLOCK=720 XY_WORD=off torchrun train_gpt.py\n```")
    assert told == [("clock", 600.0, 720.0), ("word", "on", "off")]
    assert "clock=720.0" in text
    assert "seed=1" in text


@pytest.mark.parametrize(
    "readme",
    [
        "CLOCK=720 torchrun train_gpt.py",
        "XY_CLOCK=720 torchrun other.py",
        "XY_CLOCK=720 torchrun train_gpt.py\n\nXY_SEED=1 torchrun train_gpt.py",
        "for c in 1 2; do XY_CLOCK=$c torchrun train_gpt.py; done",
    ],
    ids=["another variable", "another script", "one of two commands", "a variable of the shell"],
)
def test_what_the_command_does_not_say_stays_as_it_is(readme: str) -> None:
    assert run(OPTIONS, readme)[1] == []


def test_words_of_the_command_name_the_part_they_mean() -> None:
    text, told = run(PARTS, "python train_gpt.py --set grades.seconds=900 --set grades.rank=16 lessons.rate=0.01")
    assert sorted(told) == [("grades.rank", 8, 16), ("grades.seconds", 600.0, 900.0), ("lessons.rate", 0.02, 0.01)]
    assert text.count("seconds: float = 600.0") == 1


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"rank": 16}, {"rank": 16}, [("grades.rank", 8, 16)]),
        ({"rank": 16}, {"rank": 8}, []),
        ({"flag": True}, {"flag": True}, [("grades.flag", False, True)]),
        ({"rank": "many"}, {"rank": "many"}, []),
    ],
    ids=["both logs", "one log", "a truth value", "a value of another kind"],
)
def test_the_table_of_all_logs_is_what_ran(one: dict[str, object], other: dict[str, object], expected: object) -> None:
    grades = {"stride": 64, "rank": 8, "seconds": 600.0, "alpha": 1.0, "name": "walk", "flag": False}
    logs = {
        f"{name}.log": "start " + json.dumps({"seed": 1, "grades": grades | change, "lessons": {"steps": 20000}})
        for name, change in (("a", one), ("b", other))
    }
    assert run(PARTS, **logs)[1] == expected


def test_a_list_of_settings_is_a_table_and_a_printed_result_is_none() -> None:
    listed = "\n".join(("  data: ./d", "  wide: 640", "  deep: 9", "  keep: 11.0", "  clock: 600.0", "  word: on"))
    assert run(OPTIONS, log=listed)[1] == [("wide", 512, 640)]
    assert run(OPTIONS, log="wide: 640 deep: 9 keep: 11.0\nclock: 590.0\n")[1] == []


def test_the_source_at_the_head_of_a_log_is_no_table_of_settings() -> None:
    source = ["import os", *(f"    {name} = 3" for name in ("wide", "deep", "keep", "clock", "data", "word"))]
    listed = [*source, *["pass"] * 20, "=" * 80, "wide of 512"]
    assert run(OPTIONS, log="\n".join(listed))[1] == []


def test_a_table_of_results_is_none_of_settings() -> None:
    table = {"wide": 512, "deep": 9, "keep": 3.0, "clock": 588.2, "word": "on", "data": "./d"}
    assert run(OPTIONS, log=json.dumps(table))[1] == [("clock", 600.0, 588.2), ("keep", 11.0, 3.0)]
    assert run(OPTIONS, log=json.dumps(table | {"val_bpb": 1.2}))[1] == []
    assert run(OPTIONS, log="step 100 loss 3.1\n" + json.dumps(table))[1] == []
