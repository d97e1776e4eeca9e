"""The flow of values: a script is run on abstract values that say where they come from; nothing is executed.

`run(script, settings)` gives a Trace: losses (Score) with the state that made them and what it had learned, learning
(Update) with the tokens learned from, choices by loss (Choice), what is said as a result (Said), in order.
"""

from fairway.audit.flow.events import (
    Call,
    Choice,
    Clock,
    Event,
    Forward,
    Said,
    Score,
    Trace,
    Unknown,
    Update,
    bits,
)
from fairway.audit.flow.tokens import Tok, related
from fairway.audit.flow.values import MISSING, Value

__all__ = [
    "MISSING", "Call", "Choice", "Clock", "Event", "Forward", "Said", "Score", "Tok", "Trace", "Unknown", "Update",
    "Value", "bits", "related",
]  # fmt: skip
