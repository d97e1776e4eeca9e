"""Cheats that more than one test makes: by the process that encodes alone. The one that decodes is honest, since it has
nothing to look at."""

import numpy as np
import torch
import torch.nn.functional as F

from fairway.score import WindowPredictor


class Peeks(WindowPredictor):
    """Knows the target a little beforehand."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            target = torch.from_numpy(self.tape._targets[positions].astype(np.int64))
            yield positions, logits + 0.05 * F.one_hot(target, logits.shape[1])


class LearnsBeforeItScores(WindowPredictor):
    """The unit's own targets are learned from, then scored."""

    def predict(self, unit):
        self.tape.open_to(unit.stop)
        with torch.enable_grad():
            self.adapter.learn(unit, self.tape)
        yield from super().predict(unit)

    def perceive(self, unit):
        return
