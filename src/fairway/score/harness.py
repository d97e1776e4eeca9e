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
from fairway.score.predictor import Predictor, Tape
from fairway.score.stream import Index, Stream, Unit

Listener = Callable[[Index, Tensor], None]
"""(positions (n,), log-probabilities (n, vocab) float64): sees what is paid, returns nothing."""


def normalise(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in nats over the whole vocabulary: (n, vocab) -> (n, vocab) float64."""
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def drive(
    predictor: Predictor,
    stream: Stream,
    tape: Tape,
    tokens: npt.NDArray[Any],
    vocab: int,
    ledger: Ledger,
    temperature: float = 1.0,
    ranks: Ranks | None = None,
    after: Callable[[Unit], None] | None = None,
    listen: Listener | None = None,
) -> float:
    """Scores the whole stream on this rank's share of it, and settles the ledger over all ranks.

    tokens: (N+1,), BOS first; after: called with each unit once it is paid, before it is learned from.
    Returns the code length in nats. HonestyError where a predictor breaks a rule.
    """
    ranks = ranks or Ranks()
    if hasattr(predictor, "perceive_token"):
        raise ContractError(f"{type(predictor).__name__}: perceive_token is reserved and not driven yet; use perceive")
    for unit in stream:
        tape.open_to(unit.stop)
        mine = unit.share(ranks)
        for positions, logits in predictor.predict(mine):
            _pay(ledger, mine, positions, logits, tokens, vocab, temperature, listen)
        owed = int((~ledger.paid(mine.windows.positions)).sum())
        if owed:
            raise HonestyError(f"unit {unit.index}: {owed} of {mine.windows.scored} positions were not predicted")
        if after is not None:
            after(mine)
        tape.open_to(unit.stop + 1)
        predictor.perceive(mine)
    return ledger.settle(ranks)


def _pay(
    ledger: Ledger,
    unit: Unit,
    positions: Index,
    logits: Tensor,
    tokens: npt.NDArray[Any],
    vocab: int,
    temperature: float,
    listen: Listener | None,
) -> None:
    if tuple(logits.shape) != (len(positions), vocab):
        raise HonestyError(
            f"logits of shape {tuple(logits.shape)} for {len(positions)} positions; "
            f"a distribution over the whole vocabulary of {vocab} is needed for each"
        )
    if not len(positions):
        return
    first, stop = (int(unit.windows.first[0]), int(unit.windows.stop[-1])) if len(unit.windows) else (0, 0)
    if not first <= positions.min() <= positions.max() < stop:
        raise HonestyError(
            f"unit {unit.index}: positions {positions.min()} to {positions.max()} were predicted, "
            f"but its turn is {first} to {stop - 1}; the order is fixed beforehand"
        )
    chances = normalise(logits, temperature)
    target = torch.from_numpy(tokens[positions + 1].astype(np.int64)).to(chances.device)
    ledger.pay(positions, -chances.gather(1, target[:, None])[:, 0].cpu().numpy())
    if listen is not None:
        listen(positions, chances)
