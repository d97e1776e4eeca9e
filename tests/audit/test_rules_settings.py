"""Settings that stand in a table are as good as written out, and what they say of clocks and documents is understood."""
# ruff: noqa: E501 (examples are texts of scripts)

from pathlib import Path

import pytest

from tests.audit.small import HEAD, line_of, script, verdict

# ---- settings in tables

TABLE = 'SPEC = dict(\n    a=1, b=2, c=3.0, d="x", e=5, f=6, g=7, h=8,\n    minutes={minutes},\n)\n'
WAYS = {
    "a loop that fills a table": TABLE
    + """
from types import SimpleNamespace
def found():
    got = {{}}
    for key, default in SPEC.items():
        raw = os.environ.get(key.upper())
        got[key] = default if raw is None else type(default)(raw)
    return SimpleNamespace(**got)
S = found()
""",
    "a comprehension": TABLE
    + "import argparse\nS = argparse.Namespace(**{{k: type(v)(os.environ.get(k.upper(), v)) for k, v in SPEC.items()}})\n",
    "set on a class": TABLE
    + "class S: pass\nfor key, default in SPEC.items():\n    setattr(S, key, type(default)(os.environ.get(key.upper(), default)))\n",
    "rows of names": "class S:\n    pass\nfor name, kind, default in [\n    ('A', int, 1), ('B', int, 2), ('C', int, 3), ('D', int, 4), ('E', int, 5), ('F', int, 6), ('G', int, 7),\n"
    "    ('MINUTES', float, {minutes}),\n]:\n    setattr(S, name.lower(), kind(os.environ.get(name, default)))\n",
    "an update of the object": TABLE
    + "class Box: pass\nS = Box()\nS.__dict__.update({{k: type(v)(os.environ.get(k.upper(), v)) for k, v in SPEC.items()}})\n",
}
TRAINS = """
import time
def train(net):
    rule = torch.optim.SGD(net.parameters(), lr=0.1)
    ids = torch.from_numpy(shard("data/fineweb_train_000000.bin"))
    budget = S.minutes * 60 - 5
    begun, spent, n, over = time.perf_counter(), None, 0, False
    while not over:
        F.cross_entropy(net(ids[n : n + 512]), ids[n + 1 : n + 513]).backward()
        rule.step()
        n += 512
        over = bool(float((0.0 if spent is None else spent) + time.perf_counter() - begun >= budget))
"""


def trained(settings: str, minutes: str) -> str:
    called = 'if __name__ == "__main__":\n    net = Net()\n    train(net)\n    loss, bpb = evaluate(net)'
    text = script(extra=settings.format(minutes=minutes) + TRAINS)
    return text.replace('if __name__ == "__main__":\n    loss, bpb = evaluate(Net())', called)


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_clock_in_a_table_of_settings_is_read(settings: str, tmp_path: Path) -> None:
    text = trained(settings, "11.5")
    finding = verdict(tmp_path, "training_over_time", text)
    assert finding.verdict == "violates"
    assert "685 s" in finding.evidence
    assert verdict(tmp_path, "training_over_time", trained(settings, "10.0")).verdict == "clean"
    asked = verdict(tmp_path, "training_over_time", text, README__md="    MINUTES=10 torchrun train_gpt.py\n")
    assert asked.verdict == "clean"


def test_a_check_after_the_training_is_no_clock_that_ends_it(tmp_path: Path) -> None:
    text = trained(WAYS["a comprehension"], "10.0").replace(
        "    while not over:", "    assert time.perf_counter() - begun < 700\n    while not over:"
    )
    assert verdict(tmp_path, "training_over_time", text).verdict == "clean"


# ---- documents that are passed over

WRITES = """
import itertools, json
def ids_of(text): return spm.SentencePieceProcessor(model_file="tokenizer.model").encode(text)
def put(ids, n):
    np.array(ids, "<u2").tofile(f"data/fineweb_train_{n:06d}.bin")
def prepare():
    docs = (json.loads(line)["text"] for line in open("SOURCE"))
    HELD
"""
SKIPS = {
    "continue": "buf = []\n    for i, text in enumerate(docs):\n        if i < NUMBER: continue\n        buf += ids_of(text)\n    put(buf, 0)",
    "from on": "buf, seen = [], 0\n    for text in docs:\n        seen += 1\n        if seen > NUMBER: buf.extend(ids_of(text))\n    put(buf, 0)",
    "islice": "for n, text in enumerate(itertools.islice(docs, NUMBER, None)): put(ids_of(text), n)",
    "a slice": "put([t for text in list(docs)[NUMBER:] for t in ids_of(text)], 0)",
    "written under a test": "for i, text in enumerate(docs):\n        if not i < NUMBER:\n            put(ids_of(text), i)",
}
LIMITS = {
    "break": "buf = []\n    for i, text in enumerate(docs):\n        if i >= NUMBER: break\n        buf += ids_of(text)\n    put(buf, 0)",
    "while few": "buf = []\n    for i, text in enumerate(docs):\n        if i < NUMBER: buf += ids_of(text)\n    put(buf, 0)",
    "islice": "for n, text in enumerate(itertools.islice(docs, NUMBER)): put(ids_of(text), n)",
    "a slice": "put([t for text in list(docs)[:NUMBER] for t in ids_of(text)], 0)",
}


def prepares(how: str, number: str, source: str = "docs.jsonl") -> str:
    body = WRITES.replace("HELD", how.replace("NUMBER", number)).replace("SOURCE", source)
    return HEAD + body + "prepare()\n"


@pytest.mark.parametrize("how", SKIPS.values(), ids=SKIPS)
def test_training_text_that_begins_within_the_scored_documents_overlaps(how: str, tmp_path: Path) -> None:
    text = prepares(how, "10_000")
    finding = verdict(tmp_path, "overlap_default", script(), prepare__py=text)
    assert finding.verdict == "violates"
    assert finding.place is not None
    assert finding.place.line == line_of(text, "10_000")
    assert "40,000" in finding.evidence
    for honest in (prepares(how, "50_000"), prepares(how, "10_000", "docs_train.jsonl")):
        assert verdict(tmp_path, "overlap_default", script(), prepare__py=honest).verdict == "clean"


@pytest.mark.parametrize("how", LIMITS.values(), ids=LIMITS)
def test_training_text_that_ends_early_is_no_overlap(how: str, tmp_path: Path) -> None:
    assert verdict(tmp_path, "overlap_default", script(), prepare__py=prepares(how, "10_000")).verdict == "clean"
