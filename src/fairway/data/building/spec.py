"""What a build is told."""

from dataclasses import dataclass
from typing import Literal

from fairway.base.errors import RecipeError


@dataclass(frozen=True)
class BuildSpec:
    """How text becomes documents, and documents shards. RecipeError for what cannot be."""

    kind: Literal["auto", "text", "jsonl", "parquet"] = "auto"  # auto: by each file's suffix
    separator: str = ""  # a document of text begins wherever this stands, and keeps it; "" = a file is a document
    text_key: str = "text"  # of the objects of JSON lines, or the column of Parquet
    valid_documents: int | None = None  # held out: the first so many, as the challenge's 50,000
    valid_fraction: float = 0.01  # held out by a hash of the content, where valid_documents is None
    shard_tokens: int = 100_000_000  # of every shard but the last
    part: int = 1  # of `parts`: this host's share
    parts: int = 1
    invalid: Literal["refuse", "replace"] = "refuse"  # bytes that are no UTF-8; replace: by U+FFFD, and counted
    lossy: Literal["refuse", "report"] = "refuse"  # documents that do not come back from their tokens
    repeated: Literal["leave_out", "keep"] = "leave_out"  # training documents that stand in the held-out text too
    longest: int = 16_777_216  # bytes of a document: it is held in memory whole

    def __post_init__(self) -> None:
        for name, place, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise RecipeError(f"{place} {getattr(self, name)!r}: choices: {', '.join(choices)}")
        if self.valid_documents is not None and self.valid_documents < 0:
            raise RecipeError(f"--valid-documents {self.valid_documents}: 0 or more is possible")
        if not 0 <= self.valid_fraction <= 1:
            raise RecipeError(f"--valid-fraction {self.valid_fraction}: 0 to 1 is possible")
        if not 1 <= self.shard_tokens < 1 << 31:
            raise RecipeError(f"--shard-tokens {self.shard_tokens}: 1 to 2,147,483,647 fit into a shard's header")
        if not 1 <= self.part <= self.parts:
            raise RecipeError(f"--part {self.part}/{self.parts}: parts count from 1/{max(self.parts, 1)}")
        if self.longest < 1:
            raise RecipeError(f"--longest {self.longest}: at least one byte is needed")


_CHOICES = (
    ("kind", "--format", ("auto", "text", "jsonl", "parquet")),
    ("invalid", "--invalid", ("refuse", "replace")),
    ("lossy", "--lossy", ("refuse", "report")),
    ("repeated", "--repeated", ("leave_out", "keep")),
)
