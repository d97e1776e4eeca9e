"""SLOT as the field ran it: a shift of the hidden vectors, fitted to the very targets that it then scores."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fairway.score.adapt import slot
from fairway.score.diagnose.scene import Procedure
from fairway.score.predictor import Block
from fairway.score.stream import Unit, Windows
from fairway.score.tellers import normalise

_BATCH = 32  # consecutive windows that share a shift


class Shifted(Procedure):
    """Hidden vectors once, a shift fitted to targets, then the scored positions with the shift."""

    @torch.no_grad()
    def charges(self, unit: Unit) -> Iterator[Block]:
        for run in unit.windows.runs():
            length, scored = int(run.stop[0] - run.start[0]), int(run.stop[0] - run.first[0])
            rows = max(1, min(_BATCH, self.block_tokens // length))
            for begin in range(0, len(run), rows):
                windows: Windows = run[begin : begin + rows]
                hidden, _ = self.model(self.text.inputs(windows))
                delta = self.shift(hidden, self.text.targets(windows), scored)
                logits = self.model.logits(hidden[:, length - scored :] + delta).flatten(0, 1)
                yield windows.positions, normalise(logits, self.scene.temperature)

    def shift(self, hidden: Tensor, targets: Tensor, scored: int) -> Tensor:
        """hidden: (n, T, d), targets: (n, T), of which the last `scored` are being scored -> (n or 1, 1, d)."""
        raise NotImplementedError


class SlotBatch(Shifted):
    """#1176, #1229: standard SLOT."""

    name = "slot_batch"
    charge = "one shift for 32 windows is fitted to all their targets, those about to be scored among them"
    fit = slot.Spec(steps=5, lr=0.005, betas=(0.9, 0.999))

    def shift(self, hidden: Tensor, targets: Tensor, scored: int) -> Tensor:
        """The whole batch as one long window: (1, 1, d)."""
        return slot.shift(self.model, hidden.flatten(0, 1)[None], targets.flatten()[None], self.fit)


class SlotSample(Shifted):
    """#1319, #1329: SLOT for each sample, on what it scores."""

    name = "slot_sample"
    charge = "a shift for each window is fitted to the very targets that the window scores"
    fit = slot.Spec(steps=24, lr=0.024, betas=(0.9, 0.999))

    def shift(self, hidden: Tensor, targets: Tensor, scored: int) -> Tensor:
        return slot.shift(self.model, hidden[:, -scored:], targets[:, -scored:], self.fit)
