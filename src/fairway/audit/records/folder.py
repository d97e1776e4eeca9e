"""A record folder's numbers side by side."""

import ast
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fairway.audit.reading import Script
from fairway.audit.records.claims import FILE, Claims
from fairway.audit.records.log import Log, read
from fairway.audit.submission import Submission

_BINARY = (
    ".ptz",
    ".pt",
    ".pth",
    ".bin",
    ".xz",
    ".lzma",
    ".zst",
    ".zstd",
    ".br",
    ".fw",
    ".npz",
    ".safetensors",
    ".artifact",
)


_TEXTS = (".py", ".ipynb", ".json", ".jsonl", ".md", ".txt", ".log", ".out", ".csv", ".parquet", ".png", ".pdf")
_LARGE = 5_000_000  # bytes: what is no text and larger is an artifact, whatever it is called


_PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]  # memory goes with it: 8 MiB are the preset's


@dataclass(frozen=True, eq=False)
class Record:
    """sizes: bytes by stat(); entry: the script whose score is claimed."""

    entry: Script
    sizes: Mapping[str, int]
    claims: Claims
    logs: tuple[Log, ...]

    @property
    def code_bytes(self) -> int:
        """The entry script's bytes by stat()."""
        return self.sizes.get(self.entry.path, len(self.entry.text.encode()))

    @property
    def neighbours(self) -> dict[str, int]:
        """The other files of the folder that hold code which the entry executes or imports: path -> bytes."""
        scripts = list(self.entry.all())
        reached = [script.path for script in scripts if "!" not in script.path]
        reached += [layer.source for script in scripts for layer in script.layers if layer.source]
        return {path: self.sizes.get(path, 0) for path in reached if path != self.entry.path}

    @cached_property
    def packed_bytes(self) -> int:
        """About what the entry would weigh as a packed wrapper: LZMA, then base85."""
        return len(lzma.compress(self.entry.text.encode(), filters=_PACKING)) * 5 // 4 + 100

    @property
    def artifacts(self) -> dict[str, int]:
        """Files that may be the artifact, by their ending or by their size: path -> bytes."""
        return {
            path: size
            for path, size in self.sizes.items()
            if path.lower().endswith(_BINARY) or (size > _LARGE and not path.lower().endswith(_TEXTS))
        }

    def code_counts(self) -> set[int]:
        """Honest counts of the code: the files by stat(), with Unix line ends, and what was unpacked out of them."""
        own = {self.code_bytes, len(self.entry.text.encode()), len(self.entry.text)}
        inner = {len(script.text.encode()) for script in self.entry.all() if "!" in script.path}
        together = {count + sum(self.neighbours.values()) for count in own}
        return own | inner | together


@lru_cache(maxsize=1)
def record_of(submission: Submission) -> Record:
    """The numbers of one submission; read once for all rules."""
    logs = tuple(read(path, text) for path, text in sorted(submission.logs.items()))
    claims = Claims(submission.claims, submission.tables.get(FILE, ""))
    results = tuple(log for log in logs if log.scores or log.totals or log.steps)
    return Record(submission.entry, submission.sizes, claims, results)


def same_code(left: str, right: str) -> bool:
    """Whether two sources are the same program: comments and blank lines apart."""
    if _lines(left) == _lines(right):
        return True
    try:
        return ast.dump(ast.parse(left)) == ast.dump(ast.parse(right))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _lines(text: str) -> list[str]:
    return [row.rstrip() for row in text.split("\n") if row.strip()]
