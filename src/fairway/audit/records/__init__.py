"""What a record folder claims, logs and weighs; each number with its place, so that one can be held against another."""

from fairway.audit.records.claims import Claims
from fairway.audit.records.folder import Record, record_of
from fairway.audit.records.log import Amount, Log, Score
from fairway.audit.records.prose import evaluation_times, untimed

__all__ = ["Amount", "Claims", "Log", "Record", "Score", "evaluation_times", "record_of", "untimed"]
