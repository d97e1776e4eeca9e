"""Windows that see what those before them left: the past of every lane is kept, round by round."""

from collections.abc import Iterator, Mapping
from typing import Any

from fairway.base import slots
from fairway.score.predictor import Block, WindowPredictor, blocks_of
from fairway.score.stream import Unit, Windows


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether the windows of a recipe (its plain table) are carried."""
    return bool(slots.technique("fairway.score.windows", recipe["score"]["windows"]["kind"]).CARRIED)


def carry(predictor: WindowPredictor, unit: Unit) -> Iterator[Block]:
    """The windows of a unit, a round at a time, in as many forwards as block_tokens asks for."""
    for windows in unit.windows.rounds():
        length = int(windows.stop[0] - windows.start[0])
        columns = max(1, predictor.block_tokens // len(windows))
        predictor.past = past_of(predictor, windows)
        for begin in range(0, length, columns):
            inputs = predictor.tape.inputs(windows, begin, min(begin + columns, length))
            hidden, predictor.past = predictor.model(inputs, predictor.past)
            yield from blocks_of(predictor.model, windows.start + begin, hidden)


def past_of(predictor: WindowPredictor, windows: Windows) -> Any:
    """What these lanes have left; lanes that have ended are dropped."""
    stream = predictor.carried
    assert stream is not None
    if predictor.past is None:
        length = int((stream.edges[1:] - stream.edges[:-1]).max())
        return predictor.model.begin(len(windows), stream.context, length)
    return predictor.past.narrow(len(windows))
