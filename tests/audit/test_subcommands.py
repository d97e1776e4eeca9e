"""Sub-commands of argparse: a script that is several programs is read as the one that scores."""

import ast
from pathlib import Path

import pytest

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.subcommands import settle
from fairway.audit.trial.arguments import Parser
from fairway.audit.trial.machine import Machine
from tests.audit.small import script, verdict

COMMANDS = """
import argparse

def tokenizer(args):
    print("trained")

def train(args):
    loss, bpb = evaluate(Net())
    print(f"val_loss {loss:.5f} val_bpb {bpb:.5f}")

def parse():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--width", type=int, default=512)
    parser = argparse.ArgumentParser()
    below = parser.add_subparsers(required=True)
    one = below.add_parser("tokenizer", parents=[common])
    one.set_defaults(call=tokenizer)
    other = below.add_parser("train", parents=[common])
    other.add_argument("--stride", type=int, default=512)
    other.set_defaults(call=train)
    return parser.parse_args()

if __name__ == "__main__":
    options = parse()
    options.call(options)
"""


def commanded(step: str = "512") -> str:
    text = script().replace("512", step)
    return text[: text.index('if __name__ == "__main__":')] + COMMANDS


@pytest.mark.parametrize(("step", "expected"), [("512", "clean"), ("256", "violates")])
def test_a_score_that_a_sub_command_makes_is_read(tmp_path: Path, step: str, expected: str) -> None:
    text = commanded()
    text = text.replace("range(0, len(tokens) - 1, 512)", f"range(0, len(tokens) - 1, {step})")
    assert verdict(tmp_path, "twice_counted_tokens", text).verdict == expected


def test_the_command_that_does_the_most_is_put_in() -> None:
    tree = ast.parse(commanded())
    settle([tree])
    assert "train(options)" in ast.unparse(tree)
    assert "options.call" not in ast.unparse(tree)


def test_a_single_default_is_no_choice() -> None:
    text = COMMANDS.replace("    one.set_defaults(call=tokenizer)\n", "")
    tree = ast.parse(text)
    settle([tree])
    assert "options.call(options)" in ast.unparse(tree)


def test_options_of_all_sub_commands_are_known_in_whatever_order_they_are_made() -> None:
    """The first sub-command's options are added when the second one is there already."""
    parser = Parser(Machine(Script("train_gpt.py", "", ast.parse("")), Settings()))
    first, second = parser.add_parser("train"), parser.add_parser("tokenizer")
    first.add_argument("--stride", default=64)
    second.add_argument("--vocab", default=1024)
    assert parser.parse_args().vars == {"stride": 64, "vocab": 1024}
