"""Tokens -> weights."""

from fairway.train.averaging import AverageSpec
from fairway.train.loop import Batches, FakeQuant, Trained, TrainSpec, pretrain
from fairway.train.schedule import ScheduleSpec

__all__ = ["AverageSpec", "Batches", "FakeQuant", "ScheduleSpec", "TrainSpec", "Trained", "pretrain"]
