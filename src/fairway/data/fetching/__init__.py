"""Published token shards from the hub or a mirror of it: the only code of the house that uses the network."""

from fairway.data.fetching.download import Patience
from fairway.data.fetching.fetch import Fetched, fetch
from fairway.data.fetching.hub import Hub
from fairway.data.fetching.layout import Layout
from fairway.data.fetching.places import Mirror, Place, Published

__all__ = ["Fetched", "Hub", "Layout", "Mirror", "Patience", "Place", "Published", "fetch"]
