"""The ledger: write-once, float64. A score exists only when every position is paid, once."""

import math

import numpy as np
import numpy.typing as npt
import torch

from fairway.base.errors import HonestyError
from fairway.base.ranks import Ranks

# log-softmax in float64 may leave -1e-16 where the truth is 0; a real negative payment is a claim of p > 1.
NOISE = 1e-9
_SLICE = 1 << 22  # positions settled at a time over ranks: 16 MB


class Ledger:
    """What each of `positions` targets cost, in nats."""

    def __init__(self, positions: int) -> None:
        self._nats = np.full(positions, np.nan)
        self._settled: float | None = None

    def __len__(self) -> int:
        return len(self._nats)

    def paid(self, positions: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.bool_]:
        """Which of some positions this rank has paid, bool."""
        return ~np.isnan(self._nats[positions])

    def pay(self, positions: npt.NDArray[np.int64], nats: npt.NDArray[np.float64]) -> None:
        """Books the price of some positions, each (n,). HonestyError: a second payment, a price that is not finite or
        negative beyond noise, a position that does not exist, unequal lengths, a ledger that is already settled."""
        positions, nats = np.asarray(positions), np.asarray(nats, dtype=np.float64)
        if self._settled is not None:
            raise HonestyError("ledger: paid again after it was settled; a score is final")
        if positions.ndim != 1 or positions.shape != nats.shape or not np.issubdtype(positions.dtype, np.integer):
            raise HonestyError(f"ledger: {positions.shape} positions against {nats.shape} prices; pay one for each")
        if positions.size == 0:
            return
        if positions.min() < 0 or positions.max() >= len(self):
            far = positions.max() if positions.max() >= len(self) else positions.min()
            raise HonestyError(f"ledger: position {far} does not exist; there are {len(self)}")
        _refuse(
            positions, ~np.isfinite(nats), nats, "is not finite: look at the weights, or at the rate of the adaptation"
        )
        _refuse(positions, nats < -NOISE, nats, "is below zero: no probability is above 1")
        _refuse(positions, self.paid(positions), nats, "is a second payment; each position is scored once")
        _, first = np.unique(positions, return_index=True)
        twice = np.ones(positions.size, bool)
        twice[first] = False
        _refuse(positions, twice, nats, "is a second payment; each position is scored once")
        self._nats[positions] = np.maximum(nats, 0.0)

    def settle(self, ranks: Ranks | None = None) -> float:
        """The whole code length in nats, over all ranks; HonestyError unless each position is paid by exactly one."""
        ranks = ranks or Ranks()
        device = ranks.device
        for begin in range(0, len(self), _SLICE):
            part = torch.from_numpy(self.paid(slice(begin, begin + _SLICE)).astype(np.int32)).to(device)
            wrong = torch.nonzero(ranks.sum_(part) != 1)
            if wrong.numel():
                place = int(wrong[0])
                times = int(part[place])
                raise HonestyError(
                    f"ledger: position {begin + place} of {len(self)} is paid {times} times; "
                    "a score exists only when each is paid once"
                )
        mine = float(np.nansum(self._nats))  # pairwise in float64: within 1e-14 of the exact sum
        self._settled = float(ranks.sum_(torch.tensor([mine], dtype=torch.float64, device=device)).item())
        return self._settled

    def price(self, positions: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float64]:
        """What this rank has paid for some positions, in nats: a copy, NaN where it has not."""
        return np.array(self._nats[positions])

    def whole(self, ranks: Ranks | None = None) -> npt.NDArray[np.float32]:
        """What every position cost, in nats, whichever rank paid it; a collective, for a settled ledger."""
        ranks = ranks or Ranks()
        device = ranks.device
        found = np.nan_to_num(self._nats).astype(np.float32)
        for begin in range(0, len(self) if ranks.world > 1 else 0, _SLICE):
            part = torch.from_numpy(found[begin : begin + _SLICE]).to(device)
            found[begin : begin + _SLICE] = ranks.sum_(part).cpu().numpy()
        return found

    @property
    def code_length_bits(self) -> float:
        """Bits for all positions; HonestyError before `settle`."""
        if self._settled is None:
            raise HonestyError("ledger: no score yet; pay every position, then settle")
        return self._settled / math.log(2)


def _refuse(
    positions: npt.NDArray[np.int64], bad: npt.NDArray[np.bool_], nats: npt.NDArray[np.float64], why: str
) -> None:
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        raise HonestyError(f"ledger: position {positions[place]}: {nats[place]:.6g} nats {why}")
