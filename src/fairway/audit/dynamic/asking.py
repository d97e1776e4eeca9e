"""The asking process: holds the text and the ledger, tells tokens as they are paid, and keeps every distribution."""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.audit.dynamic.pipe import Broken, Message, Pipe
from fairway.score.ledger import Ledger

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """What is run. route: "plain" or "steps"; seconds, memory (bytes): for one run."""

    folder: Path
    name: str
    route: str = "plain"
    seconds: float = 120.0
    memory: int = 4_000_000_000


class Failed(Exception):
    """The submission did not come to the end; tried: what it tried that the seal refused."""

    def __init__(self, why: str, tried: tuple[str, ...] = ()) -> None:
        super().__init__(why)
        self.why, self.tried = why, tried


@dataclass
class Heard:
    """One run.

    rows: (N, vocab) natural logarithms, in the order of positions; order: the positions as they came
    sums: the largest |sum - 1| of distributions that the submission normalised, and where
    moved: how often predicting changed the state; ahead: tokens that were told before they were paid, as inputs
    """

    vocab: int
    facts: dict[str, Any]
    rows: Floats
    order: list[int] = field(default_factory=list)
    sums: tuple[float, int] | None = None
    moved: int = 0
    ahead: int = 0
    nats: float = math.nan
    tried: tuple[str, ...] = ()


Answer = Callable[[Ints, Floats], Ints]
"""(positions, their distributions) -> their tokens: read from the text, or decoded from a file."""

TextOf = Callable[[int], Ints]
"""vocab -> the text, (N+1,), its first token known to all."""


Connect = Callable[[Asked], AbstractContextManager[tuple[Pipe, Callable[[], str]]]]
"""Starts a submission: the pipe to it, and what ended it, where the pipe breaks."""


def ask(asked: Asked, text: TextOf, answer: Answer | None = None, connect: Connect | None = None) -> Heard:
    """Runs the submission once over a text. Failed where it does not come to the end; HonestyError from the ledger.

    answer: gives the tokens in place of the text, from which then only the length is told; connect: by default a
    sealed process.
    """
    with (connect or sealed)(asked) as (pipe, ended):
        try:
            return _listen(pipe, time.monotonic() + asked.seconds, text, answer)
        except TimeoutError as error:
            raise Failed(f"it takes more than {asked.seconds:.0f} s") from error
        except (Broken, BrokenPipeError) as error:
            raise Failed(ended()) from error


@contextmanager
def sealed(asked: Asked) -> Iterator[tuple[Pipe, Callable[[], str]]]:
    """A process of its own: see `child`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(asked.folder.resolve())
        command = [sys.executable, "-m", "fairway.audit.dynamic.child", folder, asked.name, asked.route]
        command += [str(asked.memory), str(math.ceil(asked.seconds)), scratch]
        environment = {**os.environ, "TMPDIR": scratch, "OMP_NUM_THREADS": "1", "HOME": scratch}
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(command, env=environment, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def ended() -> str:
                process.kill()
                return f"its process ended without a word (exit code {process.wait()}): memory, as a rule"

            try:
                yield Pipe(process.stdout.fileno(), process.stdin.fileno()), ended
            finally:
                process.kill()


def _listen(pipe: Pipe, until: float, text: TextOf, answer: Answer | None) -> Heard:
    heard: Heard | None = None
    tokens = np.zeros(0, np.int64)
    ledger = Ledger(1)
    while True:
        message = pipe.receive(until)
        if message.kind == "error":
            raise Failed(str(message.facts.get("what", ""))[:300], _words(message))
        if message.kind == "ready":  # fairway's interface: it needs the length before it has a vocabulary
            pipe.send(Message("begin", {"targets": len(text(2)) - 1, "bos": 0}))
        elif message.kind == "hello":
            vocab = int(message.facts["vocab"])
            tokens = text(vocab)
            ledger = Ledger(len(tokens) - 1)
            heard = Heard(vocab, message.facts, np.full((len(tokens) - 1, vocab), np.nan))
            pipe.send(Message("begin", {"targets": len(tokens) - 1}))
        elif heard is None:
            raise Broken("it spoke before it said its vocabulary")
        elif message.kind == "open":
            positions = _positions(message, len(ledger))
            heard.ahead += len(positions)
            pipe.send(Message("told", {}, tokens[positions + 1]))
        elif message.kind == "block":
            pipe.send(Message("told", {}, _paid(message, heard, ledger, tokens, answer)))
        elif message.kind == "done":
            heard.nats, heard.tried = ledger.settle(), _words(message)
            return heard


def _paid(message: Message, heard: Heard, ledger: Ledger, tokens: Ints, answer: Answer | None) -> Ints:
    """Books a block of distributions, and gives its tokens."""
    from fairway.base.errors import HonestyError

    positions = _positions(message, len(ledger))
    rows = message.rows if message.rows is not None else np.zeros(0)
    if rows.size != len(positions) * heard.vocab:
        raise HonestyError(f"{rows.size} numbers for {len(positions)} positions of a vocabulary of {heard.vocab}")
    rows = rows.reshape(len(positions), heard.vocab)
    if np.isnan(rows).any() or (rows == np.inf).any():
        raise HonestyError(f"position {positions[0]}: a distribution holds what is no number")
    if message.facts.get("normalised"):
        off = np.abs(np.exp(rows).sum(axis=1) - 1)
        worst = int(off.argmax()) if len(off) else 0
        if len(off) and (heard.sums is None or off[worst] > heard.sums[0]):
            heard.sums = (float(off[worst]), int(positions[worst]))
    else:
        rows = rows - rows.max(axis=1, keepdims=True)
        rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    targets = tokens[positions + 1] if answer is None else answer(positions, rows)
    ledger.pay(positions, np.maximum(-rows[np.arange(len(positions)), targets], 0.0))
    heard.rows[positions] = rows
    heard.order += positions.tolist()
    heard.moved += bool(message.facts.get("moved"))
    return targets


def _positions(message: Message, targets: int) -> Ints:
    found = np.array(message.facts.get("positions", []), dtype=np.int64).reshape(-1)
    if len(found) and (found.min() < 0 or found.max() >= targets):
        raise Broken("it named a position that does not exist")
    return found


def _words(message: Message) -> tuple[str, ...]:
    tried = message.facts.get("tried", [])
    return tuple(str(each)[:200] for each in tried[:50]) if isinstance(tried, list) else ()
