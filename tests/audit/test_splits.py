"""The count of held-out documents, where only its being written tells of it."""

import ast
from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.records.splits import splits
from fairway.audit.rules import overlap_default
from fairway.audit.submission import opened

SHARDS = """
import json, os, sys
import numpy as np
import sentencepiece

OPTIONS = {"docs": "d.jsonl", "held": 10_000}


def prepare(options):
    sp = sentencepiece.SentencePieceProcessor(model_file="t.model")
    tokens, split, count, shard = [], "val", 0, 0
    with open(options["docs"]) as lines:
        for line in lines:
            TURN
            tokens.extend(sp.encode(json.loads(line)["text"]))
            count += 1
            if len(tokens) >= 100_000_000:
                np.asarray(tokens, dtype="<u2").tofile(f"{split}_{shard:04d}.bin")
                tokens, shard = [], shard + 1


if __name__ == "__main__":
    prepare(OPTIONS)
"""


@pytest.mark.parametrize(
    ("turn", "counts"),
    [
        ('if split == "val" and count == options["held"]: split, shard = "train", 0', [10_000]),
        ('if count >= 10_000 and split == "val": split = "train"', [10_000]),
        ('if count < options["held"]: continue', [10_000]),
        ('if count >= options["held"]: break', []),
        ("if count % 10_000 == 0: print(count)", []),
        ('if len(tokens) == 10_000: split = "train"', []),
        ("if count < 10_000: continue", []),
        ('kept = val if count < options["held"] else train', [10_000]),
        ('kept = train if count >= options["held"] else None', [10_000]),
        ('kept = near if count < options["held"] else far', []),
    ],
)
def test_a_counter_that_turns_to_training_text_tells_the_split(turn: str, counts: list[int]) -> None:
    assert [split.count for split in splits(ast.parse(SHARDS.replace("TURN", turn)))] == counts


FILTERED = """
import argparse, json
import numpy as np
import sentencepiece

ap = argparse.ArgumentParser()
ap.add_argument("--val-docs", type=int, default=10_000)
args = ap.parse_args()
sp = sentencepiece.SentencePieceProcessor(model_file="t.model")

def documents():
    for n, line in enumerate(open("d.jsonl")):
        yield n, sp.encode(json.loads(line)["text"])

def write(name, docs):
    np.asarray([i for ids in docs for i in ids], dtype="<u2").tofile(f"{name}_000000.bin")

write("val", (ids for n, ids in documents() if n < 50_000))
write(KIND, (ids for n, ids in documents() if TEST))
"""


@pytest.mark.parametrize(
    ("kind", "test", "counts"),
    [
        ('"train"', "n >= args.val_docs", [10_000]),
        ('"train"', "n > 20_000", [20_000]),
        ('"rest"', "n >= args.val_docs", []),
        ('"train"', "len(ids) >= 10_000", []),
        ('"train"', "n < 2_000_000", []),
    ],
)
def test_documents_that_are_filtered_by_their_number_tell_it_as_well(kind: str, test: str, counts: list[int]) -> None:
    text = FILTERED.replace("KIND", kind).replace("TEST", test)
    assert [split.count for split in splits(ast.parse(text))] == counts


SKIPPED = """
import argparse, json
import numpy as np
import sentencepiece

def documents(path, skip):
    with open(path) as lines:
        for n, line in enumerate(lines):
            if TEST:
                yield json.loads(line)["text"]

def main(args):
    sp = sentencepiece.SentencePieceProcessor(model_file="t.model")
    held = []
    for text in documents(args.docs, skip=args.GIVEN):
        held.extend(sp.encode(text))
        if len(held) >= 100_000_000:
            np.asarray(held, dtype="<u2").tofile("fineweb_train_0.bin")
            held = []

parser = argparse.ArgumentParser()
parser.add_argument("--docs", default="d.jsonl")
parser.add_argument("--val-docs", type=int, default=10_000)
parser.add_argument("--first", type=int, default=10_000)
main(parser.parse_args())
"""


@pytest.mark.parametrize(
    ("over", "counts"),
    [
        ("(line for n, line in enumerate(lines) if n >= options['held'])", [10_000]),
        ("(line for n, line in enumerate(lines) if n < options['held'])", []),
        ("(line for n, line in lengths(lines) if n >= options['held'])", []),
        ("(line for n, line in enumerate(lines) if n >= 10_000)", []),
    ],
)
def test_lines_may_be_filtered_where_they_are_gone_through(over: str, counts: list[int]) -> None:
    text = SHARDS.replace("for line in lines:", f"for line in {over}:").replace("            TURN\n", "")
    assert [split.count for split in splits(ast.parse(text))] == counts


@pytest.mark.parametrize(
    ("test", "given", "counts"),
    [
        ("n >= skip", "val_docs", [10_000]),
        ("skip <= n", "val_docs", [10_000]),
        ("n < skip", "val_docs", []),
        ("n >= skip", "first", []),
    ],
)
def test_a_generator_that_gives_what_comes_after_held_out_documents(test: str, given: str, counts: list[int]) -> None:
    tree = ast.parse(SKIPPED.replace("TEST", test).replace("GIVEN", given))
    assert [split.count for split in splits(tree)] == counts


@pytest.mark.parametrize(
    ("held", "readme", "verdict"),
    [
        ("10_000", "", "violates"),
        ("50_000", "", "clean"),
        ("10_000", "python train_gpt.py --held 50000", "clean"),
    ],
)
def test_fewer_held_out_documents_than_are_scored(held: str, readme: str, verdict: str, tmp_path: Path) -> None:
    turn = 'if split == "val" and count == options["held"]: split, shard = "train", 0'
    script = SHARDS.replace("TURN", turn).replace("10_000", held).replace("prepare(OPTIONS)", "prepare(told(sys.argv))")
    (tmp_path / "train_gpt.py").write_text("import torch\n")
    (tmp_path / "shards.py").write_text(script)
    (tmp_path / "README.md").write_text(readme)
    finding = overlap_default.check(Case(opened(tmp_path)))
    assert finding.verdict == verdict, finding.evidence


def test_the_default_of_an_option_is_the_number_of_its_name() -> None:
    text = SHARDS.replace("OPTIONS = ", 'parser.add_argument("--val-docs", type=int, default=12_000)\nOPTIONS = ')
    text = text.replace("TURN", "kept = val if count < options.val_docs else train")
    assert [(split.count, split.name) for split in splits(ast.parse(text))] == [(12_000, "val_docs")]
