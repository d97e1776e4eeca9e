"""The instruments that a procedure is put before; each really does its work, and gives a verdict of its own.

tape: the harness drives the procedure, which has only the tape to read from; ledger: what it charged is booked, in
order; probe: it holds a stolen copy of the text, tokens are changed, and distributions move that may not; normalised:
its charges over the whole vocabulary are summed; bytes: the text is decoded, and its bytes are counted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fairway.base.errors import HonestyError
from fairway.score.diagnose.scene import Claim, Procedure, Scene, stolen
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Predictor
from fairway.score.probe import UNNORMALISED, Finding, examine
from fairway.score.stream import Stream
from fairway.score.tape import Tape

Verdict = tuple[str, str]
"""(instrument, what it saw)"""


def verdicts(
    kind: type[Procedure], claimed: Claim, scene: Scene, tokens: npt.NDArray[Any], seed: int = 0
) -> Iterator[Verdict]:
    """What catches a procedure; nothing, where it is honest.

    claimed: what it said of all (N+1,) tokens; tape and probe look at the beginning of them, two contexts.
    """
    short = np.array(tokens[: 2 * scene.context + 1])
    found = {
        "tape": by_tape(kind, scene, short),
        "ledger": by_ledger(claimed, len(tokens) - 1),
        "probe": by_probe(kind, scene, short, seed),
        "normalised": by_sum(claimed),
        "bytes": by_bytes(claimed, scene, tokens),
    }
    yield from ((name, seen) for name, seen in found.items() if seen)


def by_tape(kind: type[Procedure], scene: Scene, tokens: npt.NDArray[Any]) -> str:
    """What the tape refused, or nothing."""
    targets = len(tokens) - 1
    stream, tape = scene.stream(targets, kind.stage), _Watched(tokens, scene.device)
    try:
        drive(kind(scene, tape, stream, scene.block_tokens), stream, tape, tokens, scene.vocab, Ledger(targets))
    except HonestyError:  # caught here alone: the refusal is what is being measured, and no score comes of it
        return tape.refused
    return ""


def by_ledger(claimed: Claim, targets: int) -> str:
    """What the ledger refused to book. It is never settled, so that nothing here becomes a score."""
    ledger = Ledger(targets)
    try:
        for positions, nats in claimed.payments:
            ledger.pay(positions, nats)
    except HonestyError as error:
        return str(error)
    unpaid = int((~ledger.paid(slice(None))).sum())
    return f"ledger: {unpaid:,} of {targets:,} positions are not paid" if unpaid else ""


def by_probe(kind: type[Procedure], scene: Scene, tokens: npt.NDArray[Any], seed: int) -> str:
    """The kinds of findings that are not honest, with the worst of each."""

    def make(tape: Tape, stream: Stream, block: int) -> Predictor:
        return kind(scene, stolen(tape), stream, block)

    def order(targets: int) -> Stream:
        return scene.stream(targets, kind.stage)

    try:
        report = examine(
            make,
            order,
            tokens,
            scene.vocab,
            kind.stage,
            flips=kind.flips,
            block_tokens=scene.block_tokens,
            exact=scene.device.type == "cpu",
            seed=seed,
            device=scene.device,
        )
    except HonestyError:  # refused before the probe could look: the verdict belongs to what refused it
        return ""
    worst: dict[str, Finding] = {}
    for finding in report.findings:
        if not finding.honest and finding.worst > getattr(worst.get(finding.check), "worst", -1.0):
            worst[finding.check] = finding
    return "probe: " + ", ".join(map(_described, worst.values())) if worst else ""


def by_sum(claimed: Claim) -> str:
    """Whether the charges of some position were no distribution."""
    if claimed.excess <= UNNORMALISED:
        return ""
    return f"normalised: the charges at a position miss a sum of 1 by {claimed.excess:.3g}"


def by_bytes(claimed: Claim, scene: Scene, tokens: npt.NDArray[Any]) -> str:
    """Whether the bytes are those of the text that the tokens decode to."""
    text = scene.tokenizer.decode(tokens[1:], previous=int(tokens[0]))
    if claimed.bytes == len(text):
        return ""
    return f"bytes: {claimed.bytes:,} are counted, the text has {len(text):,}"


class _Watched(Tape):
    """A tape that remembers what it refused: so that a verdict is the tape's, not the harness's."""

    refused = ""

    def read(self, *where: Any, **more: Any) -> Tensor:
        return self._remember(super().read, *where, **more)

    def inputs(self, *where: Any, **more: Any) -> Tensor:
        return self._remember(super().inputs, *where, **more)

    def targets(self, *where: Any, **more: Any) -> Tensor:
        return self._remember(super().targets, *where, **more)

    def _remember(self, read: Any, *where: Any, **more: Any) -> Tensor:
        try:
            found: Tensor = read(*where, **more)
        except HonestyError as error:
            self.refused = str(error)
            raise
        return found


def _described(finding: Finding) -> str:
    if finding.check == "state":
        return f"state changed in {finding.worst:.0f} units"
    changed = f" by token {finding.changed}" if finding.changed is not None else ""
    return f"{finding.check} moved {finding.worst:.3g} nats at position {finding.position}{changed}"
