"""How long the runs of a sweep will take, learnt from those that ended: training, which some share, and the rest."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fairway.lab.sweep.book import finished
from fairway.lab.sweep.plan import Planned
from fairway.lab.sweep.trained import order, training_of
from fairway.recipe import Recipe

Runs = list[tuple[Planned, Recipe]]


class Expectation:
    """The seconds of runs that have not ended.

    A run that trains is expected to take what training took its own recipe, or else the others here, and the rest
    likewise; one that will take another's weights, the rest alone.
    """

    def __init__(self, folder: Path, planned: Runs, facts: Iterable[Mapping[str, Any]], known: Iterable[Planned] = ()):
        """planned: the runs of this call; facts: what is booked; known: the runs of former calls, which teach, too."""
        turns = [planned[place] for place in order([recipe for _, recipe in planned])]
        self.approach = {one.id: one.approach for one in (*known, *(one for one, _ in planned))}
        self.training = {one.id: training_of(recipe) or one.id for one, recipe in turns}
        self.trained = {self.training[one.id] for one, _ in planned if finished(folder, one)}
        self.rest = [one.id for one, _ in turns if not finished(folder, one)]
        self.trainings: dict[str, list[float]] = {}  # approach -> the seconds that its own trainings took
        self.others: dict[str, list[float]] = {}  # and what came beside them
        self.started: dict[Any, int] = {}  # how often, before this call
        for fact in facts:
            what, id_ = fact.get("fact"), fact.get("id", "")
            if what == "started":
                self.started[id_] = self.started.get(id_, 0) + 1
            elif what == "finished" and id_ in self.approach and self.started.get(id_) == 1 and "seconds" in fact:
                self._learn(id_, float(fact["seconds"]), float(fact.get("training_seconds", 0)))

    def end(self, id_: str, seconds: float, training: float | None) -> None:
        """A run has ended after `seconds`, of which `training` went into a training of its own; None: it failed."""
        self.rest.remove(id_)
        if training is not None:
            self.trained.add(self.training[id_])
            if id_ not in self.started:  # else it went on from a checkpoint, and these are the seconds of a part
                self._learn(id_, seconds, training)

    def seconds(self) -> dict[str, float]:
        """{id: seconds} of every run that has not ended; none where no run has ended yet, here or before."""
        if not self.others:
            return {}
        expected, trained = {}, set(self.trained)
        for id_ in self.rest:
            expected[id_] = _of(self.others, self.approach[id_])
            if self.training[id_] not in trained:
                expected[id_] += _of(self.trainings, self.approach[id_])
                trained.add(self.training[id_])
        return expected

    def _learn(self, id_: str, seconds: float, training: float) -> None:
        approach = self.approach[id_]
        self.others.setdefault(approach, []).append(seconds - training)
        if training:
            self.trainings.setdefault(approach, []).append(training)


def _of(taken: Mapping[str, list[float]], approach: str) -> float:
    """The mean of an approach's own seconds; else of everybody's; 0 where there are none."""
    every = [seconds for several in taken.values() for seconds in several]
    return fmean(taken.get(approach) or every or [0.0])
