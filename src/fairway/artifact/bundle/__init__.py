"""Code as one script: what an entry reaches in the house, stripped, packed behind a loader of a dozen lines."""

from fairway.artifact.bundle.closure import Closure, closure, imported
from fairway.artifact.bundle.packed import packed, unpacked

__all__ = ["Closure", "closure", "imported", "packed", "unpacked"]
