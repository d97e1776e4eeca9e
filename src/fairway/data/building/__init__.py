"""Any text -> token shards in the challenge's format, on all cores, as a stream, killed and continued at will."""

from fairway.data.building.folder import read_manifest
from fairway.data.building.joining import join
from fairway.data.building.making import build
from fairway.data.building.spec import BuildSpec

__all__ = ["BuildSpec", "build", "join", "read_manifest"]
