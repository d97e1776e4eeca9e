"""n-gram tables that look at the true token: a gate that knows it, and a table that is asked for it alone."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.score.diagnose.scene import Procedure, Scene
from fairway.score.predictor import Block
from fairway.score.stream import Index, Stream, Unit
from fairway.score.tape import Tape

_ORDERS = (4, 3, 2, 1)  # tokens of context, longest first


class Blended(Procedure):
    """The network's distribution and one that is counted, token by token, from what comes before each position."""

    weight = 0.4  # of the counted one, where there is one

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        super().__init__(scene, text, stream, block_tokens)
        self.seen = 0  # targets that are counted

    def blended(self, unit: Unit) -> Iterator[tuple[Index, Tensor, Tensor]]:
        """Positions (n,), the network's log-probabilities and the blend's logarithms, both (n, vocab)."""
        for positions, chances in self.read(self.inner, unit):
            tokens = self.text.read(np.zeros(1, np.int64), int(positions.max()) + 1)[0].cpu().numpy()
            rows, found = np.zeros(chances.shape), np.zeros(len(positions), bool)
            for row, position in enumerate(positions):
                self.count(tokens, int(position))
                found[row] = self.counted(tokens[: position + 1], rows[row])
            counted = torch.from_numpy(self.weight * rows).to(chances.device)
            share = torch.from_numpy(self.weight * found).to(chances.device)[:, None]
            yield positions, chances, ((1 - share) * chances.exp() + counted).log()

    def count(self, tokens: npt.NDArray[np.int64], position: int) -> None:
        """Counts the targets before `position`: all of them are inputs by then."""
        for target in range(self.seen, position):
            self.insert(tokens[: target + 1], int(tokens[target + 1]))
        self.seen = max(self.seen, position)

    def insert(self, before: npt.NDArray[np.int64], token: int) -> None:
        raise NotImplementedError

    def counted(self, before: npt.NDArray[np.int64], row: npt.NDArray[np.float64]) -> bool:
        """Writes what the counts give each token after `before` into a row (vocab,); False where they know nothing."""
        raise NotImplementedError


class OracleGate(Blended):
    """#659: an honest blend, behind a gate that is not."""

    name = "oracle_gate"
    charge = "an n-gram blend is used only where it lowers the loss of the true token"
    flips = 12  # only the flip of a position's own target shows the gate, and only where it was open

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        super().__init__(scene, text, stream, block_tokens)
        self.counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def charges(self, unit: Unit) -> Iterator[Block]:
        for positions, chances, blend in self.blended(unit):
            yield positions, torch.maximum(chances, blend)

    def predict(self, unit: Unit) -> Iterator[Block]:
        for positions, chances, blend in self.blended(unit):
            target = self.targets(positions)[:, None]
            yield positions, torch.where(blend.gather(1, target) > chances.gather(1, target), blend, chances)

    def insert(self, before: npt.NDArray[np.int64], token: int) -> None:
        for order in _ORDERS:
            if len(before) >= order:
                self.counts[tuple(before[-order:].tolist())][token] += 1

    def counted(self, before: npt.NDArray[np.int64], row: npt.NDArray[np.float64]) -> bool:
        """The relative frequencies after the longest context that has been seen: they sum to 1."""
        for order in _ORDERS:
            known = self.counts.get(tuple(before[-order:].tolist())) if len(before) >= order else None
            if known:
                row[list(known)] = np.array(list(known.values())) / known.total()
                return True
        return False


class GoldNgram(Blended):
    """#727, #779, #913: p = full[h(context, token)] / seen[h(context)], read at the true token alone.

    Collisions lift every ratio towards 1, and nobody sums them: the sum over the vocabulary was about 277 (#886).
    """

    name = "gold_ngram"
    charge = "a hashed n-gram table is read at the true token alone, so that its charges never had to sum to 1"
    primes = (36313, 27191, 51647, 81929)  # of the context's tokens, the nearest first
    prime = 131071  # of the token itself

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        super().__init__(scene, text, stream, block_tokens)
        # 15 targets to a bucket, as in the field (62 M to 4 M); fewer buckets claim more.
        self.buckets = 1 << max(2, (stream.targets // 15).bit_length() - 1)
        self.full = np.zeros((len(_ORDERS), self.buckets), np.int64)
        self.context = np.zeros((len(_ORDERS), self.buckets), np.int64)
        self.hashes = np.arange(scene.vocab, dtype=np.int64) * self.prime

    def charges(self, unit: Unit) -> Iterator[Block]:
        for positions, _, blend in self.blended(unit):
            yield positions, blend

    def predict(self, unit: Unit) -> Iterator[Block]:
        """The network's distribution, but the blend at the true token."""
        for positions, chances, blend in self.blended(unit):
            target = self.targets(positions)[:, None]
            yield positions, chances.scatter(1, target, blend.gather(1, target))

    def insert(self, before: npt.NDArray[np.int64], token: int) -> None:
        for i, order in enumerate(_ORDERS):
            if len(before) >= order:
                key = self.hashed(before, order)
                self.context[i, key & (self.buckets - 1)] += 1
                self.full[i, (key ^ int(self.hashes[token])) & (self.buckets - 1)] += 1

    def counted(self, before: npt.NDArray[np.int64], row: npt.NDArray[np.float64]) -> bool:
        for i, order in enumerate(_ORDERS):
            key = self.hashed(before, order) if len(before) >= order else 0
            seen = int(self.context[i, key & (self.buckets - 1)])
            if len(before) >= order and seen >= 2:
                row[:] = np.minimum(self.full[i, (key ^ self.hashes) & (self.buckets - 1)], seen) / seen
                return True
        return False

    def hashed(self, before: npt.NDArray[np.int64], order: int) -> int:
        key = 0
        for back in range(order):
            key ^= int(before[-1 - back]) * self.primes[back]
        return key
