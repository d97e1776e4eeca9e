"""Preparations of data, tried: scripts that cut documents into tokens, with documents and a tokenizer of our own.

What a preparation writes is held against the documents it was given: tokens that no longer tell two documents apart are
those of an easier text, and counts beside them must be of the bytes that were read (RULES.md R7, R8).
"""

from fairway.audit.preparing.case import Preparations, as_prepared, preparations

__all__ = ["Preparations", "as_prepared", "preparations"]
