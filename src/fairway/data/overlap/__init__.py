"""Documents that stand in training and in held-out text alike: exactly, or nearly."""

from fairway.data.overlap.documents import Document, Group, batched, of_block, of_shards, of_text, of_tokens
from fairway.data.overlap.folding import folded, key_of
from fairway.data.overlap.minhash import Bands, signatures
from fairway.data.overlap.scan import Example, HeldOut, Overlap, Sketch, scan
from fairway.data.overlap.shared import Shared, shared_text, shared_tokens

__all__ = [
    "Bands",
    "Document",
    "Example",
    "Group",
    "HeldOut",
    "Overlap",
    "Shared",
    "Sketch",
    "batched",
    "folded",
    "key_of",
    "of_block",
    "of_shards",
    "of_text",
    "of_tokens",
    "scan",
    "shared_text",
    "shared_tokens",
    "signatures",
]
