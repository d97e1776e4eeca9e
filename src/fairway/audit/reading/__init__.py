"""From files to texts and trees: encodings, notebooks, self-extracting scripts; bounded, and nothing is executed."""

from fairway.audit.reading.script import Gap, Layer, Script

__all__ = ["Gap", "Layer", "Script"]
