"""From files to texts and trees: encodings, notebooks, self-extracting scripts; bounded, and nothing is executed."""

from fairway.audit.reading.folder import Folder
from fairway.audit.reading.follow import Reader
from fairway.audit.reading.script import Gap, Layer, Script

__all__ = ["Folder", "Gap", "Layer", "Reader", "Script"]
