"""Preparations of data, tried with documents of our own: an easier text and miscounted bytes are told by what is
written, however the script comes to it; a preparation that loses nothing is clean; nothing of it touches the disc."""

import re
import time
from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.preparing.asking import ways
from fairway.audit.preparing.documents import DOCUMENTS, PAIRS, coded
from fairway.audit.preparing.machine import Preparer, prepared
from fairway.audit.preparing.patterns import grows
from fairway.audit.preparing.pieces import Cutter
from fairway.audit.submission import opened
from fairway.audit.verdict import Place
from tests.audit.small import script, verdict

BESIDE = '''
"""python prepare.py documents.jsonl"""
import json, re, sys, unicodedata
import numpy as np
import sentencepiece as spm

sp = spm.SentencePieceProcessor(model_file="tokenizer.model")

CHANGE

def shard(path, values):
    head = np.zeros(256, dtype="<i4")
    head[:3] = 20240520, 1, len(values)
    with open(path, "wb") as f:
        f.write(head.tobytes())
        f.write(np.asarray(values, dtype="<u2").tobytes())

def main(source):
    ids, sizes = [], []
    with open(source, encoding="utf-8") as f:
        for line in f:
            text = json.loads(line)["text"]
            cut = sp.encode(change(text))
            ids += [sp.bos_id(), *cut]
            sizes += [0, *counted(text, cut)]
    shard("data/fineweb_val_000000.bin", ids)
    shard("data/fineweb_val_widths_000000.bin", sizes)

main(sys.argv[1])
'''
AS_IT_IS = "def change(text):\n    return text\n"
TRUE = """
def counted(text, cut):
    return [len(text.encode())] + [0] * (len(cut) - 1)
"""
READS = 'WIDTHS = "data/fineweb_val_widths_*.bin"\n'  # the score's script knows the sidecar


def laid(folder: Path, change: str, counted: str = TRUE, name: str = "prepare.py") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(BESIDE.replace("CHANGE", change + counted), encoding="utf-8")
    return folder


def told(folder: Path, rule: str) -> tuple[str, str, int]:
    found = verdict(folder, rule, script().replace("V = 1024\n", "V = 1024\n" + READS, 1))
    return found.verdict, *((found.place.file, found.place.line) if found.place else ("", 0))


FOLDED = {
    "a-method-handed-on": "def change(text):\n    return ''.join(map(str.casefold, text))\n",
    "a-pattern": "def change(text):\n    return re.sub('[A-Z]', lambda m: m.group().lower(), text)\n",
    "a-table": "TABLE = str.maketrans('ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz')\n\n"
    "def change(text):\n    return text.translate(TABLE)\n",
    "signs-by-arithmetic": "def small(c):\n    return chr(ord(c) + 32) if 'A' <= c <= 'Z' else c\n\n"
    "def change(text):\n    return ''.join(small(c) for c in text)\n",
    "a-form": "def change(text):\n    return unicodedata.normalize('NFKC', text)\n",
    "accents": "def change(text):\n    apart = unicodedata.normalize('NFD', text)\n"
    "    return ''.join(c for c in apart if not unicodedata.combining(c))\n",
    "what-is-not-ascii": "def change(text):\n    return text.encode('ascii', 'ignore').decode()\n",
    "spaces": "def change(text):\n    return ' '.join(text.split())\n",
}


@pytest.mark.parametrize("change", FOLDED.values(), ids=FOLDED)
def test_a_text_that_is_made_easier_is_told_by_its_tokens(tmp_path: Path, change: str) -> None:
    state, file, line = told(laid(tmp_path, change), "lossy_text")
    assert (state, file) == ("violates", "prepare.py")
    assert line


@pytest.mark.parametrize(
    "begun", ["main(sys.argv[3])", "main(*sys.argv[1:4])", "_, model, kind, source = sys.argv\nmain(source)"]
)
def test_a_preparation_is_given_as_many_words_as_it_goes_through(tmp_path: Path, begun: str) -> None:
    """Where it reads or writes, and a tokenizer: what each is for nobody asks."""
    folder = laid(tmp_path, FOLDED["a-pattern"])
    text = (folder / "prepare.py").read_text(encoding="utf-8").replace("main(sys.argv[1])", begun)
    (folder / "prepare.py").write_text(text.replace("def main(source)", "def main(source, *_)"), encoding="utf-8")
    assert told(folder, "lossy_text")[:2] == ("violates", "prepare.py")


KEPT = {
    "as-it-is": AS_IT_IS,
    "capitals-as-signs": "def change(text):\n"
    "    return re.sub('[A-Z]', lambda m: '\\ue000' + m.group().lower(), text)\n",
    "a-name-is-folded": "KEY = 'Fineweb'.lower() + 'fineweb'.lower()\n\n" + AS_IT_IS,
    "outer-spaces": "def change(text):\n    return text.strip()\n",
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("rule", ["lossy_text", "byte_double_space", "byte_missing_mark", "byte_fallback_three"])
def test_a_preparation_that_loses_nothing_is_clean(tmp_path: Path, rule: str, change: str) -> None:
    assert told(laid(tmp_path, change), rule)[0] == "clean"


SIGNS = KEPT["capitals-as-signs"]
SPACED = "\n    return [len(sp.id_to_piece(i).replace('\\u2581', ' ').encode()) for i in cut]\n"
MISCOUNTED = {
    "changed-text": (
        "byte_transformed_text",
        SIGNS,
        "\ndef counted(text, cut):\n    return [len(change(text).encode())] + [0] * (len(cut) - 1)\n",
    ),
    "marks": (
        "byte_missing_mark",
        AS_IT_IS,
        "\ndef counted(text, cut):\n"
        "    return [1 if sp.is_byte(i) else len(sp.id_to_piece(i).encode()) for i in cut]\n",
    ),
    "fallback": (
        "byte_fallback_three",
        AS_IT_IS,
        "\ndef counted(text, cut):\n    plain = [sp.id_to_piece(i).replace('\\u2581', ' ') for i in cut]\n"
        "    return [3 if sp.is_byte(i) else len(p.encode()) for i, p in zip(cut, plain)]\n",
    ),
    "spaces-twice": (
        "byte_double_space",
        AS_IT_IS,
        "\ndef counted(text, cut):\n    plain = [sp.id_to_piece(i) for i in cut]\n"
        "    return [1 if sp.is_byte(i) else len(p.replace('\\u2581', ' ').encode()) + p.startswith('\\u2581')\n"
        "            for i, p in zip(cut, plain)]\n",
    ),
}


@pytest.mark.parametrize(("rule", "change", "counted"), MISCOUNTED.values(), ids=MISCOUNTED)
def test_bytes_beside_the_tokens_are_held_against_the_documents(
    tmp_path: Path, rule: str, change: str, counted: str
) -> None:
    folder = laid(tmp_path, change, counted)
    assert told(folder, rule)[0] == "violates"
    (found,) = Case(opened(folder)).preparations.found
    assert (found.wrong.rule.replace("-", "_"), found.place.file) == (rule, "prepare.py")
    text = (folder / "prepare.py").read_text().split("\n")[found.place.line - 1]
    assert "encode()" in text or "len(" in text


def test_a_count_that_the_score_does_not_read_is_no_denominator(tmp_path: Path) -> None:
    rule, change, counted = MISCOUNTED["marks"]
    folder = laid(tmp_path, change, counted)
    assert verdict(folder, rule, script()).verdict == "clean"


def test_marks_that_keep_the_case_are_counted_where_pieces_are(tmp_path: Path) -> None:
    """Nothing is lost, but the tokens are those of a text of other bytes, and the score's table counts them."""
    assert told(laid(tmp_path, SIGNS), "byte_transformed_text")[0] == "violates"
    (tmp_path / "prepare.py").unlink()
    assert told(tmp_path, "byte_transformed_text")[0] == "clean"


WITHIN = """
import json, sys
def prepare(source):
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    ids = []
    for line in open(source, encoding="utf-8"):
        ids += [1, *sp.encode(CHANGED)]
    np.asarray(ids, dtype="<u2").tofile("data/fineweb_val_000000.bin")

ASKED
"""
WORDS = {
    "argv": "if len(sys.argv) > 1 and sys.argv[1] == 'prepare':\n    prepare(sys.argv[2])\n    sys.exit()\n",
    "a-switch": "import argparse\nparser = argparse.ArgumentParser()\n"
    "parser.add_argument('--prepare', action='store_true')\n"
    "if parser.parse_args().prepare:\n    prepare('documents.jsonl')\n    sys.exit()\n",
    "a-stage": "import argparse\nparser = argparse.ArgumentParser()\n"
    "parser.add_argument('--stage', choices=['prep', 'train'], default='train')\n"
    "if parser.parse_args().stage == 'prep':\n    prepare('documents.jsonl')\n    sys.exit()\n",
    "a-command": "import argparse\nparser = argparse.ArgumentParser()\nbelow = parser.add_subparsers(dest='what')\n"
    "one = below.add_parser('prepare')\none.add_argument('source')\nbelow.add_parser('train')\n"
    "args = parser.parse_args()\nif args.what == 'prepare':\n    prepare(args.source)\n    sys.exit()\n",
    "a-variable": "if os.environ.get('PREPARE_DATA') == '1':\n    prepare('documents.jsonl')\n    sys.exit()\n",
}


@pytest.mark.parametrize("asked", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize(
    ("changed", "expected"), [("json.loads(line)['text']", 0), ("json.loads(line)['text'].lower()", 1)]
)
def test_a_script_that_prepares_when_asked_to_is_asked(tmp_path: Path, asked: str, changed: str, expected: int) -> None:
    text = script().replace(
        "V = 1024\n", WITHIN.replace("CHANGED", changed).replace("ASKED", asked) + "\nV = 1024\n", 1
    )
    (tmp_path / "train_gpt.py").write_text(text, encoding="utf-8")
    case = Case(opened(tmp_path))
    assert [each.wrong.rule for each in case.preparations.found] == ["lossy-text"] * expected
    assert any(len(prepared(way).disk.written) == 1 for way in ways(case))


def machine(tmp_path: Path, change: str) -> Preparer:
    laid(tmp_path, change)
    (tmp_path / "train_gpt.py").write_text(script(), encoding="utf-8")
    (way,) = ways(Case(opened(tmp_path)))
    return prepared(way)


def test_nothing_is_written_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = machine(tmp_path, AS_IT_IS + "\nopen('mine.txt', 'w').write('here')\n")
    assert found.disk.written["mine.txt"] == "here"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepare.py", "train_gpt.py"]


@pytest.mark.parametrize(
    "trap",
    [
        "while True:\n    pass\n",
        "def deep(n):\n    return deep(n + 1)\n\ndeep(0)\n",
        "re.sub('(a+)+$', '', 'a' * 60 + 'b')\n",
        "re.sub('(a|a)*b', '', 'a' * 60)\n",
        "re.sub('a', '\\\\9', 'a')\n",
        "text = 'x'\nfor _ in range(60):\n    text = text + text\n",
        "lines = (each for each in [next(lines)])\n",
    ],
    ids=["for-ever", "deep", "pattern", "choices", "no-such-group", "large", "itself"],
)
def test_a_trap_ends_soon(tmp_path: Path, trap: str) -> None:
    begun = time.process_time()
    machine(tmp_path, AS_IT_IS + "\n" + trap)
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        *dict.fromkeys(["(a+)+", "(a*|b)*c", "((x)y+){2,}", "(?:[ab]+,)*", "(a{2,3})+"], True).items(),
        *dict.fromkeys(["(a|a)*b", "(?:a|b)+", "(a?){60}", "(?P<x>a?)*", "((?:a|b)c)+"], True).items(),
        *dict.fromkeys(["a+b*", "(ab)+", r"(\(+)", "[(+]*(a)*", "[A-Z]"], False).items(),
        *dict.fromkeys(["(?:ab)+c", "(?<!a)b+", "a|b", "(a|b)c", "[A-Z]{2,}(?![a-z])"], False).items(),
    ],
)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str, expected: bool) -> None:
    assert grows(pattern) is expected
    re.compile(pattern)


def test_the_tokenizer_gives_back_every_document() -> None:
    """Its tokens decode to the text, byte for byte; what an honest table counts is the text's bytes."""
    cutter = Cutter(1024)
    for document in DOCUMENTS:
        ids = cutter.ids(document.text)
        assert cutter.decode(ids) == document.text
        assert cutter.sizes(ids, 1, 1) - 1 == document.size
        assert coded(cutter.text(ids)) == [(document.code, document.text[6:])]
    assert max(max(cutter.ids(document.text)) for document in DOCUMENTS) < cutter.vocab_size()


def test_the_pairs_differ_in_one_thing_each() -> None:
    folds = {
        "the case of letters": str.lower,
        "spaces that stand together": lambda text: " ".join(text.split()),
        "signs that are not ASCII": lambda text: text.encode("ascii", "ignore").decode(),
    }
    for pair in PAIRS:
        one, other = pair.one.text[6:], pair.other.text[6:]
        assert one != other
        if pair.thing in folds:
            assert folds[pair.thing](one) == folds[pair.thing](other)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["Hello wörld 日本  a", "x", " lead", ""])
def test_spans_of_pieces_are_those_of_the_text(text: str, prefix: bool) -> None:
    """`encode(text, out_type="immutable_proto").pieces`: each with the signs that it stands for."""
    cutter = Cutter(1024, "", prefix=prefix)
    pieces = cutter.encode(text, out_type="immutable_proto").vars["pieces"]
    assert [each.vars["id"] for each in pieces] == cutter.ids(text)
    assert "".join(each.vars["surface"] for each in pieces) == text
    ends = [0, *(each.vars["end"] for each in pieces)]
    assert [each.vars["begin"] for each in pieces] == ends[:-1]
    assert ends[-1] == len(text)
    assert all(each.vars["surface"] == text[each.vars["begin"] : each.vars["end"]] for each in pieces)


SPLITTER = '''
"""python shards.py --docs documents.jsonl"""
import argparse, json
import numpy as np
import sentencepiece as spm

SCORED = 50_000

def documents(path):
    with open(path, encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)["text"]

def put(path, ids):
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, len(ids)
    with open(path, "wb") as f:
        f.write(head.tobytes() + np.asarray(ids, "<u2").tobytes())

def shards(texts, sp, name):
    ids, many = [], 0
    for text in texts:
        ids += [1, *sp.encode(text)]
        if len(ids) >= 100_000_000:
            put(f"data/fineweb_{name}_{many:06d}.bin", ids)
            ids, many = [], many + 1
    put(f"data/fineweb_{name}_{many:06d}.bin", ids)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--docs", default="documents.jsonl")
    parser.add_argument("--val-docs", type=int, default=HELD)
    args = parser.parse_args()
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    SPLIT

main()
'''
BY_GENERATORS = """shards((text for n, text in enumerate(documents(args.docs)) if n < SCORED), sp, "val")
    rest = (text for n, text in enumerate(documents(args.docs)) if n >= args.val_docs)
    shards(rest, sp, "train")"""
BY_HAND = """texts = iter(documents(args.docs))
    shards([next(texts) for _ in range(args.val_docs)], sp, "val")
    shards(texts, sp, "train")"""
TRAINING_ALONE = """shards(documents(args.docs), sp, "train")"""


@pytest.mark.parametrize("split", [BY_GENERATORS, BY_HAND])
@pytest.mark.parametrize(("held", "expected"), [("10_000", "violates"), ("45_000", "violates"), ("50_000", "clean")])
def test_documents_that_are_scored_are_not_made_training_text(
    tmp_path: Path, split: str, held: str, expected: str
) -> None:
    """However the script comes to it: the first of 64 documents of our own, one for 5,000, are looked for."""
    text = SPLITTER.replace("SPLIT", split).replace("HELD", held)
    (tmp_path / "shards.py").write_text(text, encoding="utf-8")
    found = verdict(tmp_path, "overlap_default", script())
    assert found.verdict == expected
    if expected == "violates":
        line = next(n for n, each in enumerate(text.splitlines(), 1) if f"default={held}" in each)
        assert found.place == Place("shards.py", line)


def test_what_reads_training_text_alone_may_hold_back_as_many_as_it_likes(tmp_path: Path) -> None:
    """For a probe of its own: none of these documents is scored."""
    text = SPLITTER.replace("SPLIT", BY_HAND).replace("HELD", "10_000").replace("documents.jsonl", "docs_train.jsonl")
    text = text.replace('"val")', '"probe")')
    (tmp_path / "shards.py").write_text(text, encoding="utf-8")
    assert verdict(tmp_path, "overlap_default", script()).verdict == "clean"


def test_what_makes_training_text_of_all_documents_is_given_no_others(tmp_path: Path) -> None:
    """A file of training documents: none is passed over."""
    text = SPLITTER.replace("SPLIT", TRAINING_ALONE).replace("HELD", "10_000")
    (tmp_path / "shards.py").write_text(text, encoding="utf-8")
    assert verdict(tmp_path, "overlap_default", script()).verdict == "clean"
