"""Runs, handed in: the scripts, what they weigh, the record folder and its check."""

from fairway.lab.submit.check import CLOSE, Check, check
from fairway.lab.submit.export import Checkout, checkout, score_script, train_script
from fairway.lab.submit.record import submit
from fairway.lab.submit.weighing import Weight, weigh

__all__ = [
    "CLOSE",
    "Check",
    "Checkout",
    "Weight",
    "check",
    "checkout",
    "score_script",
    "submit",
    "train_script",
    "weigh",
]
