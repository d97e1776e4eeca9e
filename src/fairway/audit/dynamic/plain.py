"""The plain interface, in the sealed process: one distribution, then one token."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.dynamic.pipe import Message, Pipe
from fairway.audit.dynamic.watch import state_hash


def serve(pipe: Pipe, make: Callable[[], Any], facts: dict[str, Any]) -> None:
    """Predicts until the whole text is told."""
    predictor = make()
    vocab = int(predictor.vocab)
    pipe.send(Message("hello", {**facts, "vocab": vocab, "interface": "plain", "steps": True}))
    targets = int(pipe.receive().facts["targets"])
    for position in range(targets):
        before = state_hash(predictor)
        row = np.asarray(_numbers(predictor.predict()), np.float64).reshape(-1)
        moved = state_hash(predictor) != before
        pipe.send(Message("block", {"positions": [position], "moved": moved, "normalised": True}, row))
        answer = pipe.receive()
        assert answer.rows is not None
        predictor.told(int(answer.rows[0]))


def _numbers(row: Any) -> Any:
    """A tensor's numbers, whatever its device and precision."""
    return row.detach().cpu().double().numpy() if hasattr(row, "detach") else row
