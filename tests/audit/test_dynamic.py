"""Submissions at work. For each instrument: an honest one passes it, and a cheat is caught by it.

A sealed process takes a second to start, so that instruments are tried over the same pipes on threads of this process,
and the seal on processes.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairway.audit.dynamic import checks, driven, plain
from fairway.audit.dynamic.asking import Asked, Failed, ask
from fairway.audit.dynamic.checks import examine
from fairway.audit.dynamic.pipe import Broken, Message, Pipe
from fairway.audit.dynamic.watch import state_hash
from fairway.audit.verdict import Finding, Report
from fairway.base.errors import RecipeError
from fairway.cli import main

PLAIN = '''
import numpy as np


class Counts:
    """Honest: the chances of a token are its counts so far."""

    vocab = 17

    def __init__(self):
        self.counts = np.ones(self.vocab)

    def predict(self):
        return np.log(self.counts / self.counts.sum())

    def told(self, token):
        self.counts[token] += 1


class Unnormalised(Counts):
    def predict(self):
        return super().predict() + 0.3


class NoNumber(Counts):
    def predict(self):
        return np.full(self.vocab, np.nan)


class Short(Counts):
    def predict(self):
        return super().predict()[:-1]


class LearnsWhilePredicting(Counts):
    def predict(self):
        row = super().predict()
        self.counts[int(row.argmax())] += 0.5
        return row


class Caches(Counts):
    """Honest: what it keeps is named as a cache."""

    caches = ("kept",)

    def predict(self):
        self.kept = super().predict()
        return self.kept


class Dice(Counts):
    def predict(self):
        import os

        return super().predict() if os.urandom(1)[0] < 128 else np.full(self.vocab, -np.log(self.vocab))


class Reads(Counts):
    """Looks for the text where it may lie."""

    path = ""

    def __init__(self):
        super().__init__()
        self.text = open(self.path, "rb").read()


class Calls(Counts):
    def predict(self):
        import socket

        try:
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        except OSError:
            pass
        return super().predict()


class Starts(Counts):
    def __init__(self):
        super().__init__()
        import subprocess

        try:
            subprocess.run(["true"])
        except OSError:
            pass


class Sleeps(Counts):
    def predict(self):
        import time

        time.sleep(60)


class Eats(Counts):
    def predict(self):
        self.much = [np.ones(10_000_000) for _ in range(100)]
        return super().predict()


class Leaves(Counts):
    def predict(self):
        import os

        os._exit(3)


class Raises(Counts):
    def predict(self):
        raise ValueError("no weights here")
'''

FAIRWAY = '''
import torch

from fairway.score.stream import Stream
from fairway.score.windows import plain

VOCAB = 11


class Bigram:
    """Honest: counts of pairs, learned unit by unit; the inputs of a window are all it looks at."""

    vocab = VOCAB

    def __init__(self, tape, stream):
        self.tape, self.pairs = tape, torch.ones(VOCAB, VOCAB, dtype=torch.float64)

    @staticmethod
    def stream(targets):
        return Stream(targets, 16, plain.Spec(), 32)

    def logits(self, inputs):
        return self.pairs[inputs].log()

    def predict(self, unit):
        for windows in unit.windows.runs():
            inputs = self.tape.inputs(windows)
            yield windows.positions, self.logits(inputs).reshape(-1, VOCAB)

    def steps(self, unit):
        for windows in unit.windows.rounds():
            for step in range(int(windows.stop[0] - windows.start[0])):
                yield windows, step, self.logits(self.tape.inputs(windows, step, step + 1))[:, 0]

    def perceive(self, unit):
        for windows in unit.windows.runs():
            inputs, targets = self.tape.inputs(windows), self.tape.targets(windows)
            for a, b in zip(inputs.flatten().tolist(), targets.flatten().tolist()):
                self.pairs[a, b] += 1


class Peeks(Bigram):
    """A window that sees its own targets, which are its later inputs."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            told = torch.tensor(self.tape.so_far[positions].astype("int64"))
            yield positions, logits + torch.nn.functional.one_hot(told, VOCAB)


class NoSteps(Bigram):
    steps = property()


class Twice(Bigram):
    def predict(self, unit):
        for positions, logits in super().predict(unit):
            yield positions, logits
            yield positions[:1], logits[:1] + 1


class Skips(Bigram):
    def predict(self, unit):
        for positions, logits in super().predict(unit):
            yield positions[1:], logits[1:]


class TrainsFirst(Bigram):
    """Learns from the unit before it is scored."""

    def predict(self, unit):
        blocks = list(super().predict(unit))
        self.pairs[:, int(self.tape.so_far[unit.windows.positions[0]])] += 5
        yield from blocks
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("submission")
    (made / "plain.py").write_text(PLAIN)
    (made / "house.py").write_text(FAIRWAY)
    return made


@contextmanager
def on_a_thread(asked: Asked) -> Iterator[tuple[Pipe, Any]]:
    """The same conversation without the process and its seal."""
    ours, theirs = os.pipe(), os.pipe()
    child = Pipe(theirs[0], ours[1])

    def serve() -> None:
        try:
            made: dict[str, Any] = {}
            exec((asked.folder / asked.name.partition(":")[0]).read_text(), made)
            make = made[asked.name.partition(":")[2]]
            if "perceive" in dir(make):
                driven.serve(child, make, asked.route, {})
            else:
                plain.serve(child, make, {})
            child.send(Message("done", {"tried": []}))
        except (Broken, BrokenPipeError):
            pass
        finally:
            os.close(ours[1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Pipe(ours[0], theirs[1]), lambda: "it ended"
    finally:
        os.close(theirs[1])
        thread.join()
        os.close(ours[0])
        os.close(theirs[0])


def look(folder: Path, name: str, **more: Any) -> Report:
    return examine(folder, name, **{"tokens": 40, "flips": 2, "seconds": 300.0, "connect": on_a_thread, **more})


def sealed(folder: Path, name: str, **more: Any) -> Report:
    return look(folder, name, **{"connect": None, "tokens": 16, "flips": 1, **more})


def once(folder: Path, name: str, seconds: float = 300.0, memory: int = 4_000_000_000) -> Finding:
    """One run in the sealed process, and what the seal makes of it."""
    text = np.arange(9) % 7
    try:
        return checks._sealed(ask(Asked(folder, name, "plain", seconds, memory), lambda vocab: text))
    except Failed as error:
        return checks._stopped(error)[0]


def verdicts(report: Report) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in report.rules}


def said(report: Report, rule: str) -> str:
    return next(finding.evidence for finding in report.rules if finding.id == rule)


def test_an_honest_plain_predictor_passes_every_instrument(folder: Path) -> None:
    report = sealed(folder, "plain.py:Counts")
    assert set(verdicts(report).values()) == {"clean"}, report
    assert len(report.rules) == 6
    assert report.facts["sealed_by"] in ("an empty network namespace", "Python's audit hooks")
    assert 0 < report.facts["bits_per_token"] < 6
    assert "read back by a fresh process" in said(report, "dynamic-decode")
    assert report.facts["told_ahead"] == 0


@pytest.mark.parametrize(
    ("name", "rule", "verdict", "says"),
    [
        ("Unnormalised", "dynamic-sums", "violates", "sums to 1"),
        ("NoNumber", "dynamic-ledger", "violates", "no number"),
        ("Short", "dynamic-ledger", "violates", "16 numbers"),
        ("LearnsWhilePredicting", "dynamic-state", "violates", "changed the state"),
        ("Dice", "dynamic-probe", "violates", "second run"),
    ],
)
def test_a_plain_cheat_is_caught_by_its_instrument(name: str, rule: str, verdict: str, says: str, folder: Path) -> None:
    report = look(folder, f"plain.py:{name}")
    assert verdicts(report)[rule] == verdict, report
    assert says in said(report, rule)


@pytest.mark.parametrize(
    ("name", "rule", "verdict", "says"),
    [
        ("Calls", "dynamic-seal", "violates", "network"),
        ("Starts", "dynamic-seal", "suspect", "another program"),
        ("Leaves", "dynamic-seal", "cannot tell", "without a word"),
        ("Raises", "dynamic-seal", "cannot tell", "no weights here"),
        ("Missing", "dynamic-seal", "cannot tell", "Missing"),
    ],
)
def test_the_seal_sees_what_is_tried(name: str, rule: str, verdict: str, says: str, folder: Path) -> None:
    found = once(folder, f"plain.py:{name}")
    assert (found.id, found.verdict) == (rule, verdict)
    assert says in found.evidence


def test_an_unsteady_predictor_cannot_be_decoded(folder: Path) -> None:
    report = look(folder, "plain.py:Dice")
    assert verdicts(report)["dynamic-decode"] == "violates"


def test_a_cache_that_is_named_is_no_state(folder: Path) -> None:
    assert verdicts(look(folder, "plain.py:Caches", flips=1))["dynamic-state"] == "clean"


def test_the_held_out_text_cannot_be_read_from_the_disk(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_bytes(b"nobody may read this but token by token " * 4)
    (folder / "reads.py").write_text(f"from plain import Reads\nReads.path = {str(text)!r}\n")
    found = once(folder, "reads:Reads")
    assert found.verdict == "cannot tell"
    assert "sealed: file" in found.evidence
    (folder / "inside.txt").write_bytes(text.read_bytes())
    with pytest.raises(RecipeError, match="may read it"):
        look(folder, "plain.py:Counts", text=folder / "inside.txt")


def test_a_text_of_ones_own_is_told(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "t"
    text.write_bytes(bytes([3]) * 200)
    report = look(folder, "plain.py:Counts", text=text, flips=1)
    assert report.facts["bits_per_token"] < 1.5  # one token again and again is soon expected


def test_time_and_memory_are_limited(folder: Path) -> None:
    assert "more than 4 s" in once(folder, "plain.py:Sleeps", seconds=4.0).evidence
    starved = once(folder, "plain.py:Eats", memory=600_000_000).evidence
    assert "allocate" in starved or "memory" in starved


def test_an_honest_house_predictor_passes_every_instrument(folder: Path) -> None:
    report = look(folder, "house.py:Bigram", tokens=80)
    assert set(verdicts(report).values()) == {"clean"}, report
    assert len(report.rules) == 7
    assert report.facts["told_ahead"] == 80


@pytest.mark.parametrize(
    ("name", "rule", "verdict", "says"),
    [
        ("Peeks", "dynamic-probe", "violates", "was changed"),
        ("Twice", "dynamic-ledger", "violates", "second payment"),
        ("Skips", "dynamic-ledger", "violates", "paid 0 times"),
        ("TrainsFirst", "dynamic-state", "violates", "changed the state"),
    ],
)
def test_a_house_cheat_is_caught_by_its_instrument(name: str, rule: str, verdict: str, says: str, folder: Path) -> None:
    report = look(folder, f"house.py:{name}", tokens=64, flips=1)
    assert verdicts(report)[rule] == verdict, report
    assert says in said(report, rule)


def test_a_scored_distribution_that_no_decoder_has_is_told_apart(folder: Path) -> None:
    assert verdicts(look(folder, "house.py:Peeks", tokens=64, flips=1))["dynamic-steps"] == "violates"


def test_what_offers_no_steps_cannot_be_decoded_and_is_not_accused(folder: Path) -> None:
    report = look(folder, "house.py:NoSteps", tokens=64, flips=1)
    assert verdicts(report)["dynamic-decode"] == "cannot tell"


def test_a_hash_sees_one_number_in_anything_that_is_held() -> None:
    import random

    import torch

    class Holder:
        def __init__(self) -> None:
            self.a = {"x": [np.zeros(3), {1, 2}, (torch.zeros(2, dtype=torch.bfloat16),)]}
            self.net, self.dice, self.more = torch.nn.Linear(2, 2), random.Random(1), np.random.default_rng(1)
            self.me = self

    held = Holder()
    before = state_hash(held)
    assert state_hash(held) == before
    held.a["x"][2][0][1] = 1.0
    changed = state_hash(held)
    assert changed != before
    with torch.no_grad():
        held.net.weight[0, 0] += 1e-6
    assert state_hash(held) != changed
    changed = state_hash(held)
    held.dice.random()
    assert state_hash(held) != changed
    changed = state_hash(held)
    held.more.random()
    assert state_hash(held) != changed


def test_the_verb_runs_it_and_refuses_a_name_that_is_none(folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["audit", str(folder), "--dynamic", "plain.py:NoNumber", "--json"])
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "violates"
    with pytest.raises(SystemExit) as end:
        main(["audit", str(folder), "--dynamic", "plain.py"])
    assert end.value.code == 2
    assert "MODULE:OBJECT" in capsys.readouterr().err
