"""Any text -> token shards in the challenge's format, on all cores, as a stream, killed and continued at will."""

from fairway.data.building.comparing import ORDER, compare
from fairway.data.building.folder import read_manifest
from fairway.data.building.joining import join
from fairway.data.building.making import build
from fairway.data.building.spec import BuildSpec
from fairway.data.building.teaching import beginning, teach

__all__ = ["ORDER", "BuildSpec", "beginning", "build", "compare", "join", "read_manifest", "teach"]
