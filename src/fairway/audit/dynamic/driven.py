"""fairway's own interface, in the sealed process: a predictor over the units of a stream, with a tape that is written
as the text is told."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fairway.audit.dynamic.pipe import Message, Pipe
from fairway.audit.dynamic.watch import state_hash
from fairway.score.stream import Stream, Unit
from fairway.score.tape import BlankTape
from fairway.score.windows import plain


def serve(pipe: Pipe, make: Callable[..., Any], route: str, facts: dict[str, Any]) -> None:
    """route: "plain" tells a unit's tokens before it is predicted, as its inputs; "steps" tells none ahead."""
    pipe.send(Message("ready"))
    begin = pipe.receive().facts
    stream = _stream(make, int(begin["targets"]))
    tape = BlankTape(int(begin["bos"]), stream.edges)
    predictor = make(tape, stream)
    steps = hasattr(predictor, "steps")
    pipe.send(Message("hello", {**facts, "vocab": int(predictor.vocab), "interface": "fairway", "steps": steps}))
    pipe.receive()
    with torch.no_grad():
        for unit in stream:
            if route == "steps":
                _stepped(pipe, predictor, tape, unit)
            else:
                _whole(pipe, predictor, tape, unit)
            predictor.perceive(unit)


def _stream(make: Any, targets: int) -> Stream:
    own = getattr(make, "stream", None)
    if callable(own):
        made = own(targets)
        assert isinstance(made, Stream)
        return made
    return Stream(targets, int(getattr(make, "context", 256)), plain.Spec(), int(getattr(make, "chunk", 0)))


def _whole(pipe: Pipe, predictor: Any, tape: BlankTape, unit: Unit) -> None:
    positions = unit.windows.positions
    pipe.send(Message("open", {"positions": positions.tolist()}))
    told = pipe.receive().rows
    assert told is not None
    tape.so_far[positions] = told
    tape.open_to(unit.stop - 1)
    before, moved = state_hash(predictor), False
    blocks: Iterator[Any] = predictor.predict(unit)
    for places, logits in blocks:
        moved = moved or state_hash(predictor) != before
        _say(pipe, places, logits, moved)
    tape.open_to(unit.stop)


def _stepped(pipe: Pipe, predictor: Any, tape: BlankTape, unit: Unit) -> None:
    for windows, step, logits in predictor.steps(unit):
        told = _say(pipe, windows.first + step, logits, False)
        tape.write(windows, step, told)


def _say(pipe: Pipe, positions: Any, logits: Any, moved: bool) -> Any:
    rows = logits.detach().cpu().double().numpy()
    places = [int(each) for each in positions]
    pipe.send(Message("block", {"positions": places, "moved": moved, "normalised": False}, rows.reshape(-1)))
    answer = pipe.receive().rows
    return np.zeros(0, np.int64) if answer is None else answer
