"""Integers -> one small file, and back. Only an opened file may be scored."""

from fairway.artifact.container import PackSpec, open_artifact, seal
from fairway.artifact.groups import Group, GroupLayout, TensorLayout
from fairway.artifact.opened import Artifact, Sealed
from fairway.artifact.weights import write_weights

__all__ = [
    "Artifact",
    "Group",
    "GroupLayout",
    "PackSpec",
    "Sealed",
    "TensorLayout",
    "open_artifact",
    "seal",
    "write_weights",
]
