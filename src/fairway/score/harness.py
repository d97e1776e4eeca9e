"""Pay, then learn: what drives a predictor through a stream, and the only place where a target meets a distribution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.base.errors import ContractError, HonestyError
from fairway.base.ranks import Ranks
from fairway.score.ledger import Ledger
from fairway.score.predictor import Predictor
from fairway.score.stream import Index, Stream, Unit
from fairway.score.tape import Tape
from fairway.score.tellers import Softmax, Teller


def drive(
    predictor: Predictor,
    stream: Stream,
    tape: Tape,
    tokens: npt.NDArray[Any],
    vocab: int,
    ledger: Ledger,
    teller: Teller | None = None,
    ranks: Ranks | None = None,
    after: Callable[[Unit], None] | None = None,
    learned: Callable[[Unit], None] | None = None,
) -> float:
    """Scores the whole stream on this rank's share of it, and settles the ledger over all ranks.

    tokens: (N+1,), BOS first; after: called with this rank's share of each unit once it is paid, before it is learned
    from; learned: once it has been. Returns the code length in nats. HonestyError where a predictor breaks a rule.
    """
    ranks, teller = ranks or Ranks(), teller or Softmax()
    if hasattr(predictor, "perceive_token"):
        raise ContractError(f"{type(predictor).__name__}: perceive_token is for score/reshape; use perceive")
    turn = np.zeros(stream.targets, np.bool_)
    for unit in stream:
        tape.open_to(unit.stop - 1)
        mine = unit.share(ranks, stream.lanes if stream.carried else 0)
        turn[mine.windows.positions] = True
        for positions, logits in predictor.predict(mine):
            _check(unit, positions, logits, vocab, turn)
            targets = torch.from_numpy(tokens[positions + 1].astype(np.int64)).to(logits.device)
            ledger.pay(positions, teller.price(positions, logits, targets) if len(positions) else np.zeros(0))
        owed = int((~ledger.paid(mine.windows.positions)).sum())
        if owed:
            raise HonestyError(f"unit {unit.index}: {owed} of {mine.windows.scored} positions were not predicted")
        turn[mine.windows.positions] = False
        if after is not None:
            after(mine)
        tape.open_to(unit.stop)
        predictor.perceive(mine)
        if learned is not None:
            learned(mine)
    return ledger.settle(ranks)


def _check(unit: Unit, positions: Index, logits: Tensor, vocab: int, turn: npt.NDArray[np.bool_]) -> None:
    if tuple(logits.shape) != (len(positions), vocab):
        raise HonestyError(
            f"logits of shape {tuple(logits.shape)} for {len(positions)} positions; "
            f"a distribution over the whole vocabulary of {vocab} is needed for each"
        )
    if not len(positions):
        return
    outside = (positions < 0) | (positions >= len(turn))
    if outside.any() or not turn[positions].all():
        wrong = positions[outside] if outside.any() else positions[~turn[positions]]
        raise HonestyError(
            f"unit {unit.index}: position {wrong[0]} was predicted out of its turn; the order is fixed beforehand"
        )
