"""Logistic mixing (Mahoney's PAQ, 2005): experts' probabilities of a bit become one, better than each of them.

Probabilities are 16-bit integers; `stretch` takes one to log2(p / (1 − p)) in 256ths, `squash` takes it back. Experts
are added in the stretched domain with weights that follow the slope of the code length, each step divided by the
curvature so far (Newton's, of the diagonal alone), so that there is no rate to choose. Lanes that are coded together
learn together: their slopes are summed, which no order of summation can change.
"""

from functools import cache

import numpy as np

from fairway.artifact.entropy.tables import Ints, exp2, log2

ONE = 1 << 16
UNIT = 256  # of a stretched probability: one octave of odds
FARTHEST = 15 * UNIT
LEAST = 16  # of 2^16: no bit is certain
BITS = 13  # of the probabilities that are coded; with 16 rANS lost 0.36 %, for its states have no bit to spare
WEIGHT = 1 << 16  # a weight of 1
WEIGHTS_PRIOR, BIASES_PRIOR = 400, 4000  # steps of middling curvature that first weights and biases are believed
NEWTON = 369  # 256 / ln 2: from nats to a stretched probability's units


@cache
def stretches() -> Ints:
    """(65536,) log2(p / (1 − p)) in 256ths; 0 counts as 1."""
    places = np.maximum(np.arange(ONE, dtype=np.int64), 1)
    return log2(places, 8) - log2(ONE - places, 8)


@cache
def squashes() -> Ints:
    """(2 · 15 · 256 + 1,) probabilities of −15 · 256 … 15 · 256."""
    octaves = np.arange(-FARTHEST, FARTHEST + 1, dtype=np.int64)
    quarter, rest = octaves >> 2, octaves & 3
    below = exp2(-quarter, 24) + ((exp2(-quarter - 1, 24) - exp2(-quarter, 24)) * rest >> 2)
    return np.clip((ONE << 24) // ((1 << 24) + below), LEAST, ONE - LEAST)


class Mixer:
    """Weights for each depth and choice, a bias for each node of the tree of bits.

    inputs: the first expert, and how far each other one differs from it; a choice says which expert was best lately,
    and its weights begin with that expert alone, or nearly.
    """

    def __init__(self, inputs: int, depths: int) -> None:
        self.weights = np.zeros((depths, inputs, inputs), dtype=np.int64)  # depth, choice, input
        self.weights[:, :, 0] = WEIGHT
        for one in range(1, inputs):
            self.weights[:, one, one] = WEIGHT * 7 // 8
        self.curves = np.full(self.weights.shape, WEIGHTS_PRIOR * (ONE // 5) * 100**2, dtype=np.int64)
        self.biases = np.zeros(1 << depths, dtype=np.int64)
        self.bends = np.full(1 << depths, BIASES_PRIOR * (ONE // 5), dtype=np.int64)

    def mix(self, depth: int, choice: Ints, nodes: Ints, inputs: Ints) -> Ints:
        """(lanes,) probabilities of a one. choice, nodes: (lanes,); inputs: (inputs, lanes) stretched."""
        weights = self.weights[depth].T.take(choice, axis=1)
        total = ((inputs * weights).sum(axis=0) >> 16) + (self.biases.take(nodes) >> 8)
        return squashes().take(np.clip(total, -FARTHEST, FARTHEST) + FARTHEST)

    def learn(self, depth: int, choice: Ints, nodes: Ints, inputs: Ints, found: Ints, bits: Ints) -> None:
        """found: what `mix` gave; bits: (lanes,) what it was."""
        errors, spread = (bits << 16) - found, found * (ONE - found) >> 16
        slopes = inputs * errors
        curves = inputs * inputs * spread
        for one in range(len(inputs)):
            mine = choice == one
            if mine.any():
                self.curves[depth, one] += curves @ mine
                self.weights[depth, one] += ((slopes @ mine) * NEWTON << 4) // (self.curves[depth, one] >> 12)
        slope = np.zeros_like(self.biases)
        np.add.at(slope, nodes, errors)
        np.add.at(self.bends, nodes, spread)
        self.biases += (slope * NEWTON << 8) // self.bends
