"""Scored again, trained too early, chosen too late: procedures that go over the text more often than once."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fairway.base.ranks import Ranks
from fairway.model import GPT
from fairway.score.adapt import ttt
from fairway.score.diagnose.scene import Payment, Procedure, Scene, windows_of
from fairway.score.predictor import Block, Predictor
from fairway.score.stream import Stream, Unit
from fairway.score.tape import Tape
from fairway.score.tellers import normalise

State = dict[str, Tensor]


class Prepared(Procedure):
    """Goes over the text before it predicts any of it; what it then says is fixed, and nothing is learned between."""

    stage = "adapted"
    ready = False

    def prepare(self) -> None:
        """All that happens beforehand."""
        raise NotImplementedError

    def charges(self, unit: Unit) -> Iterator[Block]:
        if not self.ready:
            self.ready = True
            self.prepare()
        yield from self.read(self.inner, unit)

    def score_all(self, predictor: Predictor) -> list[Payment]:
        """One pass over the whole text, learning where the predictor learns."""
        found = []
        for unit in self.stream:
            found += [self.paid(*block) for block in self.read(predictor, unit)]
            predictor.perceive(unit)
        return found

    def adapt(self) -> None:
        """The first pass: honest, and its losses are what should have been reported."""
        learner = self.reader(self.model, self.scene.learning(self.stream.targets))
        self.earlier += self.score_all(learner)


class Rescored(Prepared):
    """#991, #568: the adapted weights score the text again."""

    name = "rescored"
    charge = "the text is scored a second time by the weights that have learned it, and the second score is reported"

    def prepare(self) -> None:
        self.adapt()


class Temperature(Prepared):
    """#576: the temperature of least loss, on tokens that are scored again."""

    name = "temperature"
    charge = "a temperature is fitted to the text's own losses, on tokens scored again after adapting"
    tried = tuple(round(0.95 + 0.01 * step, 2) for step in range(11))
    chosen = 1.0

    def prepare(self) -> None:
        self.adapt()
        nats = np.zeros(len(self.tried))
        for unit in self.stream:
            for positions, logits in self.inner.predict(unit):
                target = self.targets(positions)[:, None]
                for i, factor in enumerate(self.tried):
                    nats[i] -= float(self.normalised(logits, factor).gather(1, target).sum())
        self.chosen = self.tried[int(nats.argmin())]

    def read(self, predictor: Predictor, unit: Unit) -> Iterator[Block]:
        for positions, logits in predictor.predict(unit):
            yield positions, self.normalised(logits, self.chosen)

    def normalised(self, logits: Tensor, factor: float) -> Tensor:
        return normalise(logits, factor * self.scene.temperature)


class Pretrained(Prepared):
    """#152, #1376: training on the held-out text comes first, its score after."""

    name = "pretrained"
    charge = "the model is trained on the held-out text for several epochs before the first token is scored"
    rounds = 2  # of the adaptation's epochs: six where it has three; the field took 6 to 21

    def prepare(self) -> None:
        spec, targets = self.scene.learning(self.stream.targets), self.stream.targets
        start = np.arange(0, targets, self.scene.context, dtype=np.int64)
        everything = windows_of(start, np.minimum(start + self.scene.context, targets), start)
        whole = replace(next(iter(self.stream)), index=0, update=everything)
        adapter = ttt.Adapter(self.model, spec, 1, Ranks())
        for _ in range(self.rounds):
            adapter.learn(whole, self.text)


class BestOfPasses(Procedure):
    """#573, #611: several passes, each honest by itself, and at each token the one that did best."""

    name, stage = "best_of_passes", "adapted"
    charge = "three adapted passes are made, and each token is charged the lowest of its three losses"
    flips = 8  # only the flip of a position's own target shows the choice, and not each one does
    rates = (0.5, 1.0, 2.0)  # of the adaptation's own

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        super().__init__(scene, text, stream, block_tokens)
        spec = scene.learning(stream.targets)
        self.passes = [self.reader(copy.deepcopy(scene.model), replace(spec, lr=rate * spec.lr)) for rate in self.rates]

    def charges(self, unit: Unit) -> Iterator[Block]:
        for positions, each in self.blocks(unit):
            self.earlier += [self.paid(positions, one) for one in each]
            yield positions, each.amax(dim=0)

    def predict(self, unit: Unit) -> Iterator[Block]:
        """Of each position the whole distribution of the pass that did best at the true token."""
        for positions, each in self.blocks(unit):
            target = self.targets(positions)[None, :, None].expand(len(each), -1, 1)
            best = each.gather(2, target)[:, :, 0].argmax(dim=0)
            yield positions, each[best, torch.arange(len(positions), device=best.device)]

    def blocks(self, unit: Unit) -> Iterator[Block]:
        """Positions (n,) and log-probabilities (passes, n, vocab)."""
        for blocks in zip(*(self.read(one, unit) for one in self.passes), strict=True):
            yield blocks[0][0], torch.stack([chances for _, chances in blocks])

    def perceive(self, unit: Unit) -> None:
        for one in self.passes:
            one.perceive(unit)


class BestAveraging(Prepared):
    """The average of weights that does best on validation (#1004's search, here over the adapted trajectory)."""

    name = "best_averaging"
    charge = "averages of the adapted weights are tried on the held-out text, and the best one's score is reported"
    shares = (0.0, 0.5, 1.0, 1.5)  # of the way from the file's weights to the last adapted ones, and beyond
    decays = (0.5, 0.8)  # of averages over the chunks

    def prepare(self) -> None:
        candidates = self.candidates()
        tried = [self.score_all(self.reader(self.with_weights(state))) for state in candidates]
        self.earlier += [payment for payments in tried for payment in payments]
        best = int(np.argmin([sum(float(prices.sum()) for _, prices in payments) for payments in tried]))
        self.inner = self.reader(self.with_weights(candidates[best]))

    def candidates(self) -> list[State]:
        """Weights between the file's and the last adapted ones, and decaying averages over the chunks."""
        begun = _copied(self.model)
        averages = [_copied(self.model) for _ in self.decays]
        learner = self.reader(self.model, self.scene.learning(self.stream.targets))
        for unit in self.stream:
            self.earlier += [self.paid(*block) for block in self.read(learner, unit)]
            learner.perceive(unit)
            for decay, average in zip(self.decays, averages, strict=True):
                for name, value in self.model.state_dict().items():
                    average[name].lerp_(value.detach(), 1 - decay)
        last = self.model.state_dict()
        between = [{name: begun[name].lerp(last[name], share) for name in begun} for share in self.shares]
        return [*between, *averages]

    def with_weights(self, state: State) -> GPT:
        model = copy.deepcopy(self.scene.model)
        model.load_state_dict(state)
        return model


def _copied(model: GPT) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
